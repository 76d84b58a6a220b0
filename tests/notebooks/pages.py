"""What the page of an executed lesson shows, asserted as a reader meets it."""

import copy
import re
from html import unescape

import mlflow
from bs4 import BeautifulSoup
from mlflow import MlflowClient
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from tests.notebooks.checks import runs_of
from tests.tools.pictures import is_whole

# Images, tables, links into the UI, and progress bars that ended full, on each page.
SHOWN = {
    "00_start_here": (1, 1, 2, 0),
    "01_track_a_run": (3, 3, 1, 0),
    "02_tune_with_nested_runs": (4, 2, 2, 2),
    "03_query_and_plot_runs": (4, 7, 1, 1),
    "04_package_a_model": (1, 3, 1, 0),
    "05_register_and_promote": (0, 2, 1, 0),
    "06_serve_a_model": (1, 4, 1, 0),
    "07_run_a_project": (0, 2, 2, 0),
    "08_share_a_server": (0, 3, 1, 0),
    "10_scale_out": (2, 7, 1, 3),
}
# Lessons whose runs have pictures.
PICTURED = {
    "01_track_a_run",
    "02_tune_with_nested_runs",
    "03_query_and_plot_runs",
    "04_package_a_model",
    "06_serve_a_model",
    "10_scale_out",
}
# Cells, by a part of their source, whose subject is a path, an id or the digits of a number.
SUBJECTS = (
    "examine()",
    "get_tracking_uri()",
    "pd.Series(tags",  # lesson 01: the tags of a run
    "best_logged.model_uri)\n",  # lesson 01: a model's address
    "live_output()",  # lesson 07: what a command prints, with the id that `reproduce` takes
    "again.yaml",  # lesson 03: every digit of a learning rate
)
DRAWS = re.compile(r"plt\.subplots|\.plot\.|Display\.from_|image_grid\(|loss_curve\(|plot_parallel_coordinate\(")
UNREADABLE = re.compile(r"(?<![\w:/.])/(?:[\w.-]+/)+[\w.-]+|\b(?:m-)?[0-9a-f]{32}\b|\d\.\d{12,}")  # paths, ids, digits


def check_page(name, notebook):
    """Check the outputs of the executed lesson, saved by papermill or by JupyterLab."""
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(copy.deepcopy(notebook), {})
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    shown = (
        sum("image/png" in output.get("data", {}) for output in outputs),
        sum("<table" in output.get("data", {}).get("text/html", "") for output in outputs),
        sum("in the MLflow UI" in output.get("data", {}).get("text/html", "") for output in outputs),
        sum(line.startswith("100%|") for output in outputs for line in text_of(output).splitlines()),
    )
    assert shown == SHOWN[name]
    for cell in cells:
        check_cell(cell)


def check_cell(cell):
    """Check that the cell's image has its words, and that its text is for people."""
    images = sum("image/png" in output.get("data", {}) for output in cell.outputs)
    assert images == ("alt" in cell.metadata), f"{images} images of the cell\n{cell.source}"
    assert images or not DRAWS.search(cell.source), f"no image of the cell\n{cell.source}"
    if images:
        assert re.fullmatch(r"[A-Z].{60,}\.", cell.metadata.alt), f"an image in a sentence, not {cell.metadata.alt}"
    for output in cell.outputs:
        text = text_of(output)
        where = f"in the output of the cell\n{cell.source}\n\n{text}"
        assert not [line for line in text.splitlines() if "%|" in line and not line.startswith("100%|")], where
        assert begins_whole(text), f"a beginning is cut off {where}"
        assert not re.search(r"^\d+ +\S.* {2,}\S", text, re.M) or "<table" in str(output), f"no table, but text {where}"
        if not any(subject in cell.source for subject in SUBJECTS):
            assert not UNREADABLE.search(text), f"{UNREADABLE.search(text)[0]} {where}"


def check_html(name, path, notebook):
    """Check that each image of the lesson's HTML page has its words."""
    page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    words = [image.get("alt", "") for image in page.find_all("img")]
    drawn = sum(".png)" in cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert len(words) == SHOWN[name][0] + drawn and all(len(each) > 60 for each in words), words
    assert all(image["src"].startswith("data:") for image in page.find_all("img"))


def text_of(output):
    """Return the words that JupyterLab shows of the output: those of the HTML, where there is some."""
    if "text" in output:
        return output.text
    data = output.get("data", {})
    if "image/png" in data:
        return ""
    if "text/html" in data:
        return unescape(re.sub(r"<style.*?</style>|<[^>]+>", " ", data["text/html"], flags=re.S))
    return data.get("text/plain", "")


def begins_whole(text):
    """Whether no bracket is closed that the text has not opened."""
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return True


def check_logged_figures(name):
    """Check that nothing is cut off at the edges of the pictures that the lesson's runs have."""
    client, found = MlflowClient(), 0
    for run in runs_of(name):
        folders = [""]
        for folder in folders:
            for file in client.list_artifacts(run.info.run_id, folder):
                if file.is_dir:
                    folders.append(file.path)
                elif file.path.endswith(".png"):
                    found += 1
                    assert is_whole(mlflow.artifacts.load_image(f"runs:/{run.info.run_id}/{file.path}")), file.path
    assert bool(found) == (name in PICTURED)
