"""The lessons as a workshop sees them: a participant's JupyterLab in a real browser, and links into the MLflow UI."""

import os
import subprocess
import sys

from demo_lib.config import LESSONS, lessons
from demo_lib.store import connect, ui_link

import mlflow
import nbformat
import papermill as pm
import pytest
from mlflow import MlflowClient

from server.client import as_admin
from server.progress import progress
from tests.browser.jupyterlab import RUN_ALL, close, open_notebook
from tests.notebooks.checks import check_lesson, runs_of
from tests.notebooks.pages import check_page
from tests.tools.lessons import defaults, params_of

pytestmark = pytest.mark.xdist_group("browser")
NAMES = [path.stem for path in lessons()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_participant_runs_a_lesson_top_to_bottom_without_red(name, lab, browser, tmp_path, as_lea):
    page = open_notebook(browser, lab.url, f"{name}.ipynb")
    notebook = page.evaluate(RUN_ALL)
    page.screenshot(path=tmp_path / f"{name}.png")
    executed = nbformat.from_dict(notebook)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert code and all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [each for each in outputs if each.output_type == "error" or each.get("name") == "stderr"]
    check_page(name, executed)
    check_lesson(name, defaults(name))
    close(page)
    assert not (lab.home / "store" / "artifacts").exists()
    table = progress(lab.site.settings)
    assert table.loc["lea", name] > 0 and table.loc["finn", [*NAMES, "failed", "passed", "tried"]].sum() == 0
    with as_admin(lab.site.settings):
        assert mlflow.get_experiment_by_name(f"lea/{name}") and not mlflow.get_experiment_by_name(name)
        assert not MlflowClient().search_model_versions("name = 'fashion-classifier'")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_runs_again_with_other_parameters_under_nbval(name, lab, as_lea, tmp_path):
    lesson = pm.iorw.load_notebook_node(str(LESSONS / f"{name}.ipynb"))
    notebook = pm.parameterize.parameterize_notebook(lesson, params_of(name))
    nbformat.write(notebook, lab.home / "notebooks" / f"nbval_{name}.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--rootdir", str(lab.home), "-c", os.devnull, str(lab.home / "notebooks" / f"nbval_{name}.ipynb")]
    # A pytest in pytest's own folder would make that folder root's only, and PostgreSQL lives there as another user.
    command += ["--basetemp", str(tmp_path / "nbval")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    statuses = {run.info.status for run in runs_of(name)}
    assert "FINISHED" in statuses and "RUNNING" not in statuses


@pytest.mark.slow
def test_a_participant_runs_lessons_by_batch(lab, as_lea):
    command = [sys.executable, "-m", "demo_lib", "run", "--jobs", "2", "00", "01", "--output", str(lab.home / "build")]
    done = subprocess.run([*command, "-p", "train_images", "600"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert mlflow.get_experiment_by_name("lea/batch")
    found = runs_of("batch")  # lesson 10 has left one, too
    batch_id = found[0].data.tags["batch_id"]
    assert [run.info.status for run in found if run.data.tags["batch_id"] == batch_id] == ["FINISHED"] * 3


@pytest.mark.slow
def test_jupyterlab_opens_a_lesson_without_a_question_or_a_build_check(lab, browser):
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{lab.url}/workspaces/quiet/tree/{NAMES[0]}.ipynb")
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")
    page.wait_for_timeout(3000)  # the question comes late
    assert page.get_by_role("heading", name="Start here").is_visible()
    assert not page.get_by_text("Jupyter news").count()
    assert not [address for address in asked if "api/build" in address or "api/news" in address]
    page.close()


@pytest.mark.slow
def test_links_open_the_right_pages_in_a_fresh_profile(home, ui, browser):
    experiment = connect("links")
    with mlflow.start_run(run_name="linked-run") as run:
        mlflow.log_param("channels", 16)
    for target, expected in ((run, "channels"), (experiment, "linked-run")):
        page = browser.new_context().new_page()
        page.goto(str(ui_link(target)))
        page.get_by_text(expected).first.wait_for(timeout=60_000)
        page.close()


def test_a_second_ui_on_the_port_is_refused_with_the_address(home, ui):
    done = subprocess.run([sys.executable, "-m", "demo_lib", "ui"], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"if the MLflow UI is there, open {ui}, else set DEMO_UI_PORT" in done.stderr
