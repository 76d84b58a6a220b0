"""Every exercise through its public functions: nothing done, wrong attempts, the solution, two sittings."""

import re
import shutil

from demo_lib.exercises import EXERCISES, check, solution
from demo_lib.store import connect

import mlflow
import papermill as pm
import pytest

from tests.exercises.attempts import TWO_SITTINGS, WRONG
from tests.tools.make_exercises import SOLUTIONS

NOTEBOOKS = sorted(SOLUTIONS.glob("*.ipynb"))
NUMBERS = {
    path.stem: re.findall(r"^## (\d\d\.\d) ", path.read_text("utf-8").replace('"', "\n"), re.M) for path in NOTEBOOKS
}


@pytest.fixture
def afresh(template, tmp_path, monkeypatch):
    """Give each call a new store, connected to the experiment `exercises`."""
    made = []

    def make():
        while mlflow.active_run():
            mlflow.end_run()
        folder = tmp_path / f"home{len(made)}"
        made.append(folder)
        (folder / "store").mkdir(parents=True)
        shutil.copy(template / "store" / "mlflow.db", folder / "store")
        (folder / "data").symlink_to(template / "data")
        monkeypatch.setenv("DEMO_HOME", str(folder))
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        connect("exercises")

    return make


def execute(path, tmp_path):
    """Run the notebook as a batch does, and return it."""
    return pm.execute_notebook(path, tmp_path / path.name, progress_bar=False, cwd=path.parent, kernel_name="python3")


@pytest.mark.parametrize("number", EXERCISES)
def test_nothing_done_is_not_attempted(number, home):
    assert check(number).answer == "not attempted"
    connect("exercises")
    reply = check(number)
    assert reply.answer == "not attempted"
    if not EXERCISES[number].missing:
        assert f"`exercise = {number}`" in reply.text and "`exercises`" in reply.text


@pytest.mark.parametrize("number", EXERCISES)
def test_wrong_attempts_get_a_reply_each_that_names_the_mistake(number, afresh):
    assert len(WRONG[number]) >= 3
    replies = {}
    for attempt, evidence in WRONG[number]:
        afresh()
        attempt()
        reply = check(number)
        assert reply.answer == "not yet", f"{attempt.__name__}: {reply}"
        said = " ".join([reply.text, *(text for met, text in reply.points if not met)])
        assert re.search(evidence, said, re.IGNORECASE), f"{attempt.__name__}: {reply}"
        assert reply.link and len(reply.text) < 500
        replies[attempt.__name__] = re.sub(r"`[a-z]+-[a-z]+-\d+`|\([0-9a-f]{6}\)", "", said)
    assert len(set(replies.values())) == len(replies), replies


@pytest.mark.parametrize("number", TWO_SITTINGS)
def test_an_attempt_in_two_sittings_passes(number, afresh):
    afresh()
    sittings = TWO_SITTINGS[number]()
    next(sittings)
    while mlflow.active_run():
        mlflow.end_run()
    assert check(number).answer in ("not yet", "not attempted")
    connect("exercises")
    assert next(sittings, "done") == "done"
    assert check(number).answer == "passed", str(check(number))


# The first in `make test`; `make test-slow` runs all, here and on a server with a login.
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[] if path.stem < "01" else pytest.mark.slow) for path in NOTEBOOKS],
)
def test_the_solutions_pass_and_still_do_with_wrong_attempts_beside_them(path, home, tmp_path):
    done = execute(path, tmp_path)
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    for number in NUMBERS[path.stem]:
        reply = check(number)
        assert reply.answer == "passed" and reply.link, str(reply)
        assert solution(number).text.startswith("```python\n")
    connect("exercises")
    for number in NUMBERS[path.stem]:
        for attempt, _ in WRONG[number]:
            attempt()
            while mlflow.active_run():
                mlflow.end_run()
        assert check(number).answer == "passed", str(check(number))
