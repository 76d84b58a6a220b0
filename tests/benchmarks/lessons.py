"""Measures of the lessons: each in a new store and again, its imports apart, and all of them by one job and by two."""

from collections.abc import Iterator

from demo_lib.ops import batch
from demo_lib.ops.jobs import Job, plan

import nbformat

from tests.benchmarks.rows import Row, new_home, seconds


def measure_lessons() -> Iterator[Row]:
    """All lessons with their defaults, once each: in a new store, again in the same one, and two at a time."""
    with new_home() as home:
        cold, warm = plan([], {}, home / "cold"), plan([], {}, home / "warm")
        one = seconds(run, cold, 1)
        run(warm, 1)
        for first, again in zip(cold, warm, strict=True):
            yield Row(f"{first.name} cold", [], [first.seconds])
            yield Row(f"{first.name} warm", [first.seconds], [again.seconds])
            yield Row(f"{first.name} imports", [import_seconds(first)], [import_seconds(again)])
    with new_home() as home:
        yield Row("jobs", [one], [seconds(run, plan([], {}, home / "build"), 2)])


def run(jobs: list[Job], count: int) -> None:
    """Run the jobs, so many at once; all must finish, or their seconds say nothing."""
    batch.run(jobs, count)
    failed = [job.name for job in jobs if job.status != "FINISHED"]
    assert not failed, failed


def import_seconds(job: Job) -> float:
    """Return how long the executed notebook's first cell of code took, which has its imports."""
    cells = nbformat.read(job.output, as_version=4).cells
    imports = next(cell for cell in cells if cell.cell_type == "code" and "import" in cell.source)
    return imports.metadata.papermill.duration
