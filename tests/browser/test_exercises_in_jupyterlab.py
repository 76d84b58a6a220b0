"""The exercises as a participant of a workshop does them, in a real browser, and as the teacher sees it."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

from demo_lib.config import ROOT
from demo_lib.exercises import EXERCISES, check
from demo_lib.exercises.words import solution

import nbformat
import pytest

from server.progress import progress
from tests.browser.jupyterlab import (
    RUN_ALL,
    close,
    code_cell,
    empty_cell_before,
    open_notebook,
    reply,
    run,
    type_into,
)
from tests.tools.make_exercises import EXERCISES as FOLDER
from tests.tools.processes import normal_signals, wait_until

pytestmark = pytest.mark.xdist_group("browser")
NAMES = [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]


def code_of(number):
    """Return the solution's code, one text for each of its cells."""
    return solution(number, show=True).text.removeprefix("```python\n").removesuffix("\n```")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_untouched_exercise_runs_top_to_bottom_without_red(name, lab, browser, as_lea):
    page = open_notebook(browser, lab.url, f"exercises/{name}.ipynb")
    executed = nbformat.from_dict(page.evaluate(RUN_ALL))
    code = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source]
    assert code and all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [each for each in outputs if each.output_type == "error" or each.get("name") == "stderr"]
    replies = [str(output) for output in outputs if "alert-" in str(output.get("data", {}).get("text/html"))]
    checks = [cell.source for cell in code if cell.source.startswith("check(")]
    assert len(replies) == len(checks) and all("not attempted" in each for each in replies)
    close(page)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_untouched_exercise_runs_under_nbval(name, home, tmp_path):
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--rootdir", str(FOLDER), "-c", os.devnull, str(FOLDER / f"{name}.ipynb")]
    command += ["--basetemp", str(tmp_path / "nbval")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@contextmanager
def watching(site, path):
    """Run `progress --watch` until the block ends, and give how to look at a person's line."""
    given = ["--profile", "workshop", "--folder", str(site.settings.folder), "--port", str(site.settings.port)]
    command = [sys.executable, "-u", "-m", "server", "progress", *given, "--watch", "1"]
    environment = os.environ | {"MLFLOW_DEMO_SERVER_ADMIN_PASSWORD": site.admin[1]}

    def line(name):
        found = [line.split() for line in path.read_text().splitlines() if line.strip().startswith(f"{name} ")]
        return found[-1] if found else None

    with path.open("w") as file:
        process = subprocess.Popen(command, stdout=file, cwd=ROOT, env=environment, preexec_fn=normal_signals)
        try:
            yield line
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130


@pytest.mark.slow
def test_a_participant_works_through_exercise_02_while_the_teacher_watches(lab, browser, as_lea, tmp_path):
    page = open_notebook(browser, lab.url, "exercises/02_nest_your_trials.ipynb")
    page.evaluate(RUN_ALL)
    with watching(lab.site, tmp_path / "watched.txt") as line:
        wait_until(lambda: line("lea"))
        before = int(line("lea")[1])
        wrong = code_of("02.1").replace(", parent_run_id=parent.info.run_id", "")
        type_into(page, empty_cell_before(page, 'check("02.1")'), wrong)
        said = reply(page, "02.1")
        assert "02.1 not yet" in said and "has no children, but 6 runs without a parent" in said
        wait_until(lambda: line("lea")[4] == "02.1,")
        for number in ("02.1", "02.2", "02.3"):
            type_into(page, empty_cell_before(page, f'check("{number}")'), code_of(number))
            assert f"{number} passed" in reply(page, number)
        wait_until(lambda: int(line("lea")[1]) == before + 3)
    close(page)
    table = progress(lab.site.settings)
    assert table.loc["lea", ["02.1", "02.2", "02.3"]].tolist() == ["passed"] * 3
    assert table.loc["finn", "not_begun"] == len(EXERCISES)


def test_a_reply_is_read_from_the_page_after_typing(home, browser, lab, as_lea):
    page = open_notebook(browser, lab.url, "exercises/00_record_runs.ipynb")
    for source in ("from demo_lib", "train = load_data"):
        run(page, code_cell(page, source))
    assert "00.1 not attempted" in reply(page, "00.1")
    type_into(page, empty_cell_before(page, 'check("00.1")'), code_of("00.1").replace("range(3)", "range(2)"))
    assert "There is a good run for seed 0 and 1, none for 2" in reply(page, "00.1")
    type_into(page, empty_cell_before(page, 'check("00.1")'), code_of("00.1"))
    assert "00.1 passed" in reply(page, "00.1")
    assert check("00.1").answer == "passed"
    cell = code_cell(page, "quiz(")
    type_into(page, cell, 'quiz("00", "a", "b", "c")')
    assert cell.locator(".jp-OutputArea-output em").count() == 3
    close(page)
