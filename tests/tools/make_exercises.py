"""Write `notebooks/exercises/` from `notebooks/solutions/`: `make exercises`.

A cell tagged `solution` becomes an empty one, further ones of the same exercise and those tagged `hint` are left out.
"""

import json
from pathlib import Path

from demo_lib.config import LESSONS

import nbformat

SOLUTIONS, EXERCISES = LESSONS / "solutions", LESSONS / "exercises"


def exercise_of(solution: Path) -> str:
    """Return the text of the exercise's notebook."""
    notebook = nbformat.read(solution, as_version=4)
    kept, emptied = [], None
    for cell in notebook.cells:
        tags = cell.metadata.pop("tags", [])
        if "hint" in tags or ("solution" in tags and tags == emptied):
            continue
        if "solution" in tags:
            cell.source, emptied = "", tags
        kept.append(cell)
    notebook.cells = kept
    return json.dumps(json.loads(nbformat.writes(notebook)), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write every exercise, and remove those that have no solution."""
    EXERCISES.mkdir(exist_ok=True)
    written = {path.name: exercise_of(path) for path in sorted(SOLUTIONS.glob("*.ipynb"))}
    for path in EXERCISES.glob("*.ipynb"):
        if path.name not in written:
            path.unlink()
    for name, text in written.items():
        (EXERCISES / name).write_text(text, encoding="utf-8")
    print(f"wrote {len(written)} notebooks to {EXERCISES}")


if __name__ == "__main__":
    main()
