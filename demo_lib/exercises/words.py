"""Hints and solutions of the exercises: they are written in `notebooks/solutions/`."""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache

from demo_lib.config import LESSONS, DemoError
from demo_lib.exercises.judging import check, find_exercise

_given: Counter[str] = Counter()


@dataclass(frozen=True)
class Words:
    """Markdown that a notebook shows rendered and a terminal as it is."""

    text: str

    def __str__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        return self.text


@cache
def _cells(lesson: str) -> list[dict]:
    paths = sorted((LESSONS / "solutions").glob(f"{lesson}_*.ipynb"))
    if not paths:
        raise DemoError(f"the solutions are not in {LESSONS / 'solutions'}: clone the repository.")
    return [cell for path in paths for cell in json.loads(path.read_text("utf-8"))["cells"]]


def _tagged(number: str, kind: str) -> list[str]:
    """Return the sources of the cells that have both tags, the kind and the exercise's number."""
    find_exercise(number)
    wanted = {kind, number}
    found = [cell for cell in _cells(number[:2]) if wanted <= set(cell["metadata"].get("tags", ()))]
    return ["".join(cell["source"]) for cell in found]


def hint(number: str) -> Words:
    """Return the exercise's next hint; after the last one, that one again. An unknown number is a DemoError."""
    hints = _tagged(number, "hint")
    _given[number] = min(_given[number] + 1, len(hints))
    which = _given[number]
    more = "" if which < len(hints) else f' This is the last hint; `solution("{number}", show=True)` shows the code.'
    return Words(f"**Hint {which} of {len(hints)}.** {hints[which - 1]}{more}")


def solution(number: str, show: bool = False) -> Words:
    """Return the exercise's code once it is passed, or with `show`; an unknown number is a DemoError."""
    code = "\n\n".join(_tagged(number, "solution"))
    if not show and (answer := check(number).answer) != "passed":
        return Words(f'Exercise {number} is {answer}. `solution("{number}", show=True)` shows the code all the same.')
    return Words(f"```python\n{code}\n```")
