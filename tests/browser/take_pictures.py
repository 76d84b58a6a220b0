"""Take the README's pictures: `python -m tests.browser.take_pictures`.

Runs the lessons with their defaults in a new store and looks at it with the MLflow UI in a real browser.
"""

import os
import subprocess
import sys
import tempfile

from demo_lib.config import ROOT
from demo_lib.tracking import connect, ui_link

import mlflow
from playwright.sync_api import Page

from tests.browser.chromium import chromium
from tests.tools.processes import free_port, serving

PICTURES = ROOT / "docs" / "pictures"


def show(page: Page, address: str, text: str) -> None:
    """Open the address and wait for the text; close the assistant that a fresh profile opens."""
    page.goto(address)
    page.get_by_text(text).first.wait_for(timeout=60_000)
    page.get_by_text("MLflow Assistant").first.wait_for()
    page.get_by_role("button", name="Close").first.click()


def main() -> None:
    """Take every picture."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"DEMO_HOME": home, "DEMO_UI_PORT": str(port := free_port())}
        command = [sys.executable, "-m", "demo_lib"]
        subprocess.run([*command, "run"], check=True)
        experiment = connect("01_track_a_run")
        run = mlflow.search_runs([experiment.experiment_id], "status = 'FINISHED'", output_format="list")[0]
        with serving([*command, "ui"], f"http://127.0.0.1:{port}/health"), chromium() as browser:
            page = browser.new_page(viewport={"width": 1200, "height": 700})
            show(page, str(ui_link(run)), "Model metrics")
            page.get_by_text("Model metrics").first.click()
            page.get_by_text("val_loss").first.wait_for()
            page.wait_for_timeout(3000)  # the charts are drawn after the page is there
            page.screenshot(path=PICTURES / "run_metrics.png")


if __name__ == "__main__":
    main()
