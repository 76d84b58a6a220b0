"""The exercises' solutions as a participant runs them on a workshop's server, and what the teacher then sees."""

from demo_lib.config import LESSONS
from demo_lib.exercises import EXERCISES, check

import papermill as pm
import pytest

from server.participants import add
from server.progress import progress
from tests.exercises.test_notebooks import headings

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.slow]
SOLUTIONS = sorted((LESSONS / "solutions").glob("*.ipynb"))


@pytest.fixture(scope="module")
def una(workshop):
    """The password of una, a participant."""
    passwords = {}
    add(workshop.settings, ["una"], passwords.update)
    return passwords["una"]


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_a_solution_passes_with_a_login(path, workshop, una, login, home, tmp_path):
    login("una", una)
    done = pm.execute_notebook(path, tmp_path / path.name, progress_bar=False, cwd=path.parent, kernel_name="python3")
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    for number, *_ in headings(path):
        assert check(number).answer == "passed", str(check(number))


def test_the_teacher_sees_what_was_passed(workshop, una):
    row = progress(workshop.settings).loc["una"]
    assert row[list(EXERCISES)].tolist() == ["passed"] * len(EXERCISES)
    assert row[["passed", "tried", "not_begun"]].tolist() == [len(EXERCISES), 0, 0]
