"""Every lesson: its anatomy, and what its pages and the store show when the batch run has executed it."""

import re

from demo_lib.config import LESSONS, ROOT, TrainConfig, lessons, read_yaml
from demo_lib.ops import batch
from demo_lib.ops.jobs import plan

import nbformat
import papermill as pm
import pytest

from tests.notebooks.checks import check_lesson
from tests.notebooks.pages import check_html, check_logged_figures, check_page
from tests.tools.lessons import defaults, params_of, read
from tests.tools.processes import scoring_servers, team_servers, wait_until

NAMES = [path.stem for path in lessons()]


def text(name):
    return "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_is_committed_clean(name):
    notebook = read(name)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    assert "papermill" not in notebook.metadata and notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_has_all_its_parts(name):
    cells, words = read(name).cells, text(name)
    assert re.match(r"# \w", cells[0].source)
    for part in ("**What you'll do:**", "**What you'll learn**", "## What you need", "**Try it.**", "## Recap"):
        assert part in words, part
    assert "## In practice" in words
    goals = words.split("**What you'll learn**")[1].split("##")[0].count("\n- ")
    recap = words.split("## Recap")[1].split("##")[0].count("\n- ")
    assert 2 <= goals <= 4 and recap == goals
    sections = [line for line in words.splitlines() if line.startswith("## ") and line != "## Exercises"]
    assert 3 <= len(sections) - 3 <= 5
    assert len(cells) <= 45
    lengths = sorted(len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code")
    assert lengths[len(lengths) // 2] <= 5 and lengths[-1] <= 25
    kinds = "".join(cell.cell_type[0] for cell in cells)
    assert "cccc" not in kinds


@pytest.mark.parametrize("name", NAMES)
def test_the_links_of_a_lesson_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text(name)):
        assert (LESSONS / target).exists(), target


@pytest.mark.parametrize("page", ["README.md", "notebooks/00_start_here.ipynb"])
def test_the_maps_name_every_lesson(page):
    content = (ROOT / page).read_text()
    for name in NAMES:
        assert f"{name}.ipynb" in content, name


def test_the_parameters_of_lesson_01_are_those_of_the_configuration():
    inspected = pm.inspect_notebook(LESSONS / "01_track_a_run.ipynb")
    assert TrainConfig(**defaults("01_track_a_run")) == TrainConfig()
    assert list(inspected) == list(TrainConfig.model_fields)
    assert all(each["help"] for each in inspected.values())


def test_the_parameter_files_fit():
    assert TrainConfig(**read_yaml(LESSONS / "params" / "quick.yaml")) == TrainConfig()
    assert TrainConfig(**read_yaml(LESSONS / "params" / "full.yaml")).train_images == 60_000


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_runs_with_other_parameters_as_its_pages_and_the_store_show(name, home, monkeypatch):
    (job,) = jobs = plan([name], params_of(name), home / "build")
    batch.run(jobs)
    assert job.status == "FINISHED", job.error
    executed = nbformat.read(job.output, as_version=4)
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    check_page(name, executed)
    check_html(name, job.output.with_suffix(".html"), executed)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/store/mlflow.db")
    check_lesson(name, params_of(name))
    check_logged_figures(name)


FAILURES = {
    "06_serve_a_model": ("server = serve(", {"train_images": 500, "epochs": 1}, scoring_servers),
    "08_share_a_server": ("server = launch(", {"train_images": 500}, team_servers),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_cell_leaves_no_server(name, home, tmp_path):
    start, params, servers = FAILURES[name]
    notebook = read(name)
    started = next(index for index, cell in enumerate(notebook.cells) if start in cell.source)
    notebook.cells = [*notebook.cells[: started + 1], nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(notebook, tmp_path / "failing.ipynb")
    with pytest.raises(pm.PapermillExecutionError, match="ZeroDivisionError"):
        pm.execute_notebook(tmp_path / "failing.ipynb", tmp_path / "out.ipynb", params, progress_bar=False)
    assert "http://127.0.0.1:" in (tmp_path / "out.ipynb").read_text()
    wait_until(lambda: not servers(home))
