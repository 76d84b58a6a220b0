"""Exercises whose answers are judged by what lies in the store; this wing calls the core.

`evidence` reads the store, `judging` makes a reply of it, `words` has hints and solutions, `quiz` three questions a
lesson. `lesson_NN` says what the exercises of a lesson expect, `capstone` what the last one does. `hunts` makes runs
with faults to find, and `faults` says which.
"""

from demo_lib.exercises import (  # noqa: F401
    capstone,
    lesson_00,
    lesson_01,
    lesson_02,
    lesson_03,
    lesson_04,
    lesson_05,
    lesson_06,
    lesson_07,
    lesson_08,
    lesson_10,
)
from demo_lib.exercises.hunts import hunt
from demo_lib.exercises.judging import EXERCISES, check, check_all, find_exercise
from demo_lib.exercises.quiz import quiz
from demo_lib.exercises.words import hint, solution

import pandas as pd

__all__ = ["EXERCISES", "check", "check_all", "find_exercise", "hint", "hunt", "progress", "quiz", "solution"]

for _number in sorted(EXERCISES):  # modules are imported in another order
    EXERCISES[_number] = EXERCISES.pop(_number)


def progress() -> pd.DataFrame:
    """Return a table of all exercises: number, title and the answer of `check`."""
    replies = check_all(EXERCISES)
    rows = [{"exercise": each.number, "task": each.title, "answer": each.answer} for each in replies]
    return pd.DataFrame(rows).set_index("exercise")
