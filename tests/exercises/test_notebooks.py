"""The exercises' notebooks: written from the solutions, complete, and whole when nobody has touched them."""

import re

from demo_lib.config import lessons
from demo_lib.exercises import EXERCISES, hint
from demo_lib.exercises.quiz import QUESTIONS, quiz
from demo_lib.exercises.words import solution

import nbformat
import pytest

from tests.tools.make_exercises import EXERCISES as FOLDER
from tests.tools.make_exercises import SOLUTIONS, exercise_of

PATHS = sorted(SOLUTIONS.glob("*.ipynb"))
WHOLE_HOURS = {"03.3", "09.1", "09.2"}  # the hunts and the training of one's own
HEADING = re.compile(r"^## (\d\d\.\d) (.+) \((\d+) minutes\)$", re.M)


def words_of(path):
    return "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")


def headings(path):
    """Return the number, title and minutes of each exercise in the notebook."""
    return HEADING.findall(words_of(path))


def test_each_exercise_is_what_its_solution_makes():
    assert {path.name for path in FOLDER.glob("*.ipynb")} == {path.name for path in PATHS}
    for path in PATHS:
        assert (FOLDER / path.name).read_text("utf-8") == exercise_of(path), f"run `make exercises` ({path.name})"


def test_every_exercise_has_its_task_and_every_lesson_two_or_three():
    written = [(number, title.lower()) for path in PATHS for number, title, _ in headings(path)]
    assert written == [(each.number, each.title.lower()) for each in EXERCISES.values()]
    for path in lessons():
        assert 2 <= sum(number.startswith(path.stem[:2]) for number in EXERCISES) <= 4


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_an_exercise_notebook_has_all_its_parts(path):
    notebook, tasks = nbformat.read(FOLDER / path.name, 4), headings(path)
    assert not any(cell.get("outputs") or cell.get("execution_count") or cell.metadata for cell in notebook.cells)
    total = re.search(r"(?:take|takes) about (\d+) minutes", words_of(path))
    assert int(total[1]) == sum(int(minutes) for *_, minutes in tasks)
    sources = [cell.source for cell in notebook.cells]
    for number, _, minutes in tasks:
        assert 2 <= int(minutes) <= 90
        place = sources.index(f'check("{number}")')
        assert sources[place - 1] == "" and notebook.cells[place - 1].cell_type == "code"
        code = [line for line in solution(number, show=True).text.splitlines()[1:-1] if line.strip()]
        most = 70 if number in WHOLE_HOURS else 20
        assert 1 <= len(code) <= most, f"{number}: {len(code)} lines"
        hints = [hint(number).text for _ in range(4)]
        assert len(set(hints)) >= 2 and hints[-1] == hints[-2] and "This is the last hint" in hints[-1]
        assert hints[0].startswith("**Hint 1 of ")
    (asked,) = [source for source in sources if source.startswith("quiz(")]
    assert asked.removeprefix('quiz("').removesuffix('")') in QUESTIONS


def test_lessons_and_exercises_lead_to_each_other():
    for path in PATHS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", words_of(path)):
            assert (FOLDER / target).exists(), f"{path.name}: {target}"
    for lesson in lessons():
        (own, *_) = [path.name for path in PATHS if path.name[:2] == lesson.name[:2]]
        assert f"(exercises/{own})" in words_of(lesson)
        assert f"(../{lesson.name})" in words_of(SOLUTIONS / own)
    for path in PATHS:
        assert any(f"exercises/{path.name}" in words_of(lesson) for lesson in lessons()), path.name


@pytest.mark.parametrize("lesson", QUESTIONS)
def test_a_quiz_has_three_questions_and_an_explanation_for_every_choice(lesson, home):
    shown = quiz(lesson).text
    assert len(QUESTIONS[lesson]) == 3 and len(re.findall(r"^\*\*\d\. ", shown, re.M)) == 3
    said = set()
    for letter in "abc":
        answered = quiz(lesson, letter, letter, letter).text
        assert len(re.findall(r"^\*[abc] is (?:not )?right\.\* \S", answered, re.M)) == 3
        said |= {line for line in answered.splitlines() if line.startswith(f"*{letter}")}
    assert len(said) == 9
    for bad in (("a", "a", "a", "a"), ("z",), ("",)):
        with pytest.raises(Exception, match=r"answer"):
            quiz(lesson, *bad)


def test_the_right_letters_differ_within_a_quiz():
    from demo_lib.exercises.evidence import Evidence

    letters = [
        asked.choices.index(asked.right)
        for makers in QUESTIONS.values()
        for asked in (make(Evidence(lambda experiment: None)) for make in makers)
    ]
    assert len(set(letters)) >= 3 and max(letters.count(each) for each in letters) < len(letters) / 2


def test_an_unknown_number_is_a_sentence(home):
    from demo_lib.config import DemoError
    from demo_lib.exercises import check

    for call in (check, hint, solution, quiz):
        with pytest.raises(DemoError, match=r"there is no (exercise|quiz) '2\.1'"):
            call("2.1")
