"""Three questions to each lesson, where it makes sense about what lies in the learner's own store."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from demo_lib.config import DemoError
from demo_lib.exercises.evidence import Evidence
from demo_lib.exercises.judging import NOT_THERE, open_evidence, soon_given_up
from demo_lib.exercises.words import Words

LETTERS = "abcdef"


@dataclass(frozen=True)
class Question:
    """A question, its right answer and why it is right, and for each wrong answer what is wrong with it."""

    text: str
    right: str
    why: str
    wrong: dict[str, str]

    @property
    def choices(self) -> list[str]:
        """The answers by letter, in an order that is the same every time and does not give the right one away."""
        return sorted([self.right, *self.wrong], key=lambda choice: zlib.crc32(f"{self.text}{choice}".encode()))

    def show(self, number: int, letter: str | None) -> str:
        """Return the question as Markdown and, if a letter was chosen, what is to say of that answer."""
        lines = [f"**{number}. {self.text}**", ""]
        lines += [f"- {sign}. {choice}" for sign, choice in zip(LETTERS, self.choices, strict=False)]
        if letter is not None:
            chosen = self.choices[LETTERS.index(letter)]
            said = (
                f"*{letter} is right.* {self.why}"
                if chosen == self.right
                else f"*{letter} is not right.* {self.wrong[chosen]}"
            )
            lines += ["", said]
        return "\n".join(lines)


Ranked = tuple[str, float]


def best_and_others(
    values: dict[str, float], lowest: bool = False, least: int = 3
) -> tuple[Ranked, list[Ranked]] | None:
    """Return the best of the values and the up to three next ones; None if it is no question which is the best.

    That is so if fewer than `least` of them differ, or two are equally good.
    """
    known = [(name, value) for name, value in values.items() if not math.isnan(value)]
    ranked = sorted(known, key=lambda each: each[1], reverse=not lowest)[:4]
    if len({value for _, value in ranked}) < least or ranked[0][1] == ranked[1][1]:
        return None
    return ranked[0], ranked[1:]


QUESTIONS: dict[str, list[Callable[[Evidence], Question]]] = {}


def question(lesson: str) -> Callable:
    """Add the function, which makes a question from the learner's store or from nothing, to the lesson's quiz."""

    def add(ask: Callable[[Evidence], Question]) -> Callable:
        QUESTIONS.setdefault(lesson, []).append(ask)
        return ask

    return add


def quiz(lesson: str, *answers: str) -> Words:
    """Show the lesson's three questions; given letters, as in `quiz("02", "b", "a", "c")`, judge these answers.

    An unknown lesson, more answers than questions, or an answer that is no choice's letter is a DemoError.
    """
    if lesson not in QUESTIONS:
        raise DemoError(f"there is no quiz {lesson!r}; there are {', '.join(sorted(QUESTIONS))}.")
    try:
        with soon_given_up():
            evidence = open_evidence()
            asked = [ask(evidence) for ask in QUESTIONS[lesson]]
    except (DemoError, *NOT_THERE):  # without a store the questions are about nobody's runs
        asked = [ask(Evidence(lambda experiment: None)) for ask in QUESTIONS[lesson]]
    if len(answers) > len(asked):
        raise DemoError(f"there are {len(asked)} questions, and you gave {len(answers)} answers.")
    letters = [str(answer).strip().lower() for answer in answers]
    for each, letter in zip(asked, letters, strict=False):
        if letter not in [*LETTERS[: len(each.choices)]]:
            raise DemoError(
                f"{letter!r} is no answer to {each.text!r}: give a letter from a to {LETTERS[len(each.choices) - 1]}."
            )
    chosen = [*letters, *[None] * (len(asked) - len(letters))]
    pages = [each.show(number, letter) for number, (each, letter) in enumerate(zip(asked, chosen, strict=True), 1)]
    if not answers:
        pages.append(f'Answer with letters: `quiz("{lesson}", "a", "a", "a")`.')
    return Words("\n\n".join(pages))
