"""A JupyterLab for the tests, and what a person does there: open a notebook, run cells, type into one, read a reply."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from demo_lib.config import ROOT
from demo_lib.ops.processes import free_port

from playwright.sync_api import Browser, Locator, Page

from tests.tools.processes import serving

READY = """async () => {
    const {context, sessionContext, revealed} = window.jupyterapp.shell.currentWidget;
    await Promise.all([context.ready, sessionContext.ready, revealed]);
}"""
RUN_ALL = """async () => {
    const app = window.jupyterapp;
    await app.commands.execute('notebook:run-all-cells');
    return app.shell.currentWidget.context.model.toJSON();
}"""


@contextmanager
def jupyterlab(home: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Run JupyterLab on a copy of the notebooks in the home until the block ends, and give its address."""
    port = free_port()
    shutil.copytree(ROOT / "notebooks", home / "notebooks")
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={home / 'notebooks'}", "--IdentityProvider.token="]
    command += ["--LabApp.expose_app_in_browser=True"]
    jupyter = {"JUPYTER_CONFIG_DIR": str(home / "jupyter"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    with serving(command, f"http://127.0.0.1:{port}/lab", env=os.environ | environment | jupyter):
        yield f"http://127.0.0.1:{port}/lab"


def open_notebook(browser: Browser, lab: str, path: str) -> Page:
    """Open the notebook, by its path below `notebooks/`, in a page of its own, and wait for its kernel."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(600_000)
    # A workspace remembers what was open in it.
    page.goto(f"{lab}/workspaces/{Path(path).stem}-{Path(path).parent.name}/tree/{path}")
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")
    page.evaluate(READY)
    return page


def close(page: Page) -> None:
    """End the notebook's kernel and close the page."""
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()


def code_cell(page: Page, source: str) -> Locator:
    """Return the first code cell whose source begins like this."""
    index = page.evaluate(
        """source => window.jupyterapp.shell.currentWidget.content.widgets.findIndex(
            cell => cell.model.type === 'code' && cell.model.sharedModel.source.startsWith(source))""",
        source,
    )
    assert index >= 0, source
    page.evaluate("index => window.jupyterapp.shell.currentWidget.content.scrollToItem(index)", index)
    return page.locator(f'.jp-Notebook .jp-Cell[data-windowed-list-index="{index}"]')


def empty_cell_before(page: Page, source: str) -> Locator:
    """Return the cell before the one whose source begins like this."""
    index = int(code_cell(page, source).get_attribute("data-windowed-list-index")) - 1
    return page.locator(f'.jp-Notebook .jp-Cell[data-windowed-list-index="{index}"]')


def type_into(page: Page, cell: Locator, code: str) -> None:
    """Replace what is in the cell by the code, key by key, and run it; the editor indents new lines itself."""
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    for number, line in enumerate(code.splitlines()):
        if number:
            page.keyboard.press("Enter")
            page.keyboard.press("Shift+Home")  # what the editor indented by itself
            page.keyboard.press("Delete")
        page.keyboard.type(line)
    run(page, cell)


def run(page: Page, cell: Locator) -> None:
    """Run the cell and wait until it has ended."""
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    page.wait_for_function(
        """() => {
            const {sessionContext} = window.jupyterapp.shell.currentWidget;
            const cell = window.jupyterapp.shell.currentWidget.content.activeCell;
            return sessionContext.session?.kernel?.status === 'idle' && cell.model.executionState !== 'running'
                && cell.model.executionCount !== null;
        }"""
    )


def reply(page: Page, number: str) -> str:
    """Run the check of the exercise and return the words of its reply."""
    cell = code_cell(page, f'check("{number}")')
    run(page, cell)
    return cell.locator(".jp-OutputArea-output .alert").inner_text()
