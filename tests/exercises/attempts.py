"""Attempts at the exercises that learners make: wrong ones, and right ones made in two sittings.

Each module `lesson_NN` registers those of its lesson. The connected experiment is `exercises`.
"""

from collections import defaultdict
from collections.abc import Callable, Generator
from importlib import import_module
from pathlib import Path

WRONG: dict[str, list[tuple[Callable[[], None], str]]] = defaultdict(list)
TWO_SITTINGS: dict[str, Callable[[], Generator]] = {}


def wrong(number, evidence):
    """Register an attempt, named after its mistake; the reply must match the pattern `evidence`."""

    def add(attempt):
        WRONG[number].append((attempt, evidence))
        return attempt

    return add


def two_sittings(number):
    """Register a right attempt that yields where the first sitting ends."""

    def add(attempt):
        TWO_SITTINGS[number] = attempt
        return attempt

    return add


for path in sorted(Path(__file__).parent.glob("[lhc]*_[0-9]*.py")):
    import_module(f"tests.exercises.{path.stem}")
