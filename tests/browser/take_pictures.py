"""Take the README's pictures: `python -m tests.browser.take_pictures`.

Runs the lessons with their defaults in a new store, looks at it with the MLflow UI in a real browser, and does an
exercise in JupyterLab there.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from demo_lib.config import LESSONS, ROOT
from demo_lib.exercises import solution
from demo_lib.ops.processes import free_port
from demo_lib.runs import best, children
from demo_lib.store import connect, ui_link

import mlflow
from mlflow.entities import Run
from PIL import Image
from playwright.sync_api import Browser, Page

from tests.browser.chromium import chromium
from tests.browser.jupyterlab import (
    close,
    code_cell,
    empty_cell_before,
    jupyterlab,
    open_notebook,
    reply,
    run,
    type_into,
)
from tests.tools.processes import serving

PICTURES = ROOT / "docs" / "pictures"
USUAL, TALL = {"width": 1200, "height": 700}, {"width": 1200, "height": 1000}


def show(page: Page, address: str, text: str) -> None:
    """Open the address and wait for the text; close the assistant that a fresh profile opens."""
    page.goto(address)
    page.get_by_text(text).first.wait_for(timeout=60_000)
    page.get_by_text("MLflow Assistant").first.wait_for()
    page.get_by_role("button", name="Close").first.click()


def in_ui(page: Page) -> None:
    """Take the pictures of the MLflow UI: a run's metrics, a study's nested runs, its trials compared."""
    show(page, str(ui_link(find("01_track_a_run", "rate 0.012"))), "Model metrics")
    page.get_by_text("Model metrics").first.click()
    page.get_by_text("val_loss").first.wait_for()
    save(page, "run_metrics.png")

    experiment = connect("02_tune_with_nested_runs")
    page.goto(str(ui_link(experiment)))
    page.get_by_role("row").filter(has_text="by hand").get_by_role("button").first.click()
    page.get_by_text("trial 11").first.wait_for()
    page.get_by_text("Columns").first.click()
    page.get_by_text("val_accuracy", exact=True).first.click()
    page.get_by_text("Dataset", exact=True).last.click()
    page.keyboard.press("Escape")
    page.set_viewport_size(TALL)
    save(page, "nested_runs.png")
    page.set_viewport_size(USUAL)

    parent = find("03_query_and_plot_runs", "queried")
    trials = json.dumps(children(parent.info.run_id).run_id.tolist())
    address = str(ui_link(parent)).partition("#")[0]
    address += f'#/compare-runs?runs={trials}&experiments=["{parent.info.experiment_id}"]'
    page.goto(f"{address}&workflowType=machine_learning")
    page.get_by_text("Parallel Coordinates Plot").first.wait_for()
    save(page, "compared_runs.png")


def of_replies(browser: Browser, home: Path) -> None:
    """Take the picture of two replies in JupyterLab: to a wrong attempt at exercise 02.1, and to a right one."""
    right = solution("02.1", show=True).text.removeprefix("```python\n").removesuffix("\n```")
    shots = []
    with jupyterlab(home, {"DEMO_HOME": str(home)}) as lab:
        page = open_notebook(browser, lab, "exercises/02_nest_your_trials.ipynb")
        for source in ("from tempfile", "data = load_data"):
            run(page, code_cell(page, source))
        for code in (right.replace(", parent_run_id=parent.info.run_id", ""), right):
            type_into(page, empty_cell_before(page, 'check("02.1")'), code)
            reply(page, "02.1")
            page.mouse.move(0, 0)
            shots.append(Image.open(io.BytesIO(code_cell(page, 'check("02.1")').screenshot())))
        close(page)
    both = Image.new("RGB", (shots[0].width, sum(shot.height for shot in shots)), "white")
    for number, shot in enumerate(shots):
        both.paste(shot, (0, number * shots[0].height))
    both.save(LESSONS / "pictures" / "replies.png")  # where a lesson's page can take it in


def from_store() -> None:
    """Take the plots that the lessons logged: one of the study, and the best run's loss."""
    study = find("03_query_and_plot_runs", "queried").info.run_id
    plotted = best("03_query_and_plot_runs", "val_accuracy", where="tags.trial_state = 'COMPLETE'").run_id[0]
    for run_id, path in ((study, "study/optimization_history.png"), (plotted, "loss_curve.png")):
        shutil.copy(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=path), PICTURES)


def find(experiment: str, name: str) -> Run:
    """Return the experiment's run of that name."""
    connect(experiment)
    return mlflow.search_runs(filter_string=f"attributes.run_name = '{name}'", output_format="list")[0]


def save(page: Page, name: str) -> None:
    """Save what the page shows, once its charts are drawn, which comes after the page is there."""
    page.wait_for_timeout(3000)
    page.screenshot(path=PICTURES / name)


def main() -> None:
    """Take every picture."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"DEMO_HOME": home, "DEMO_UI_PORT": str(port := free_port())}
        command = [sys.executable, "-m", "demo_lib"]
        subprocess.run([*command, "run"], check=True)
        from_store()
        with serving([*command, "ui"], f"http://127.0.0.1:{port}/health"), chromium() as browser:
            in_ui(browser.new_page(viewport=USUAL))
            of_replies(browser, Path(home))


if __name__ == "__main__":
    main()
