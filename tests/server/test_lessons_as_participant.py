"""The lessons run unchanged against the workshop profile, as one of its participants."""

import os
import subprocess
import sys

from demo_lib.batch import lessons as paths

import mlflow
import pytest
from bs4 import BeautifulSoup
from mlflow import MlflowClient

from server.client import as_admin
from server.participants import add
from server.progress import progress
from tests.notebooks.pages import SHOWN

LESSONS = [path.stem for path in paths()]
TAKEN = [name for name in LESSONS if name[:2] <= "07"]  # lesson 08 runs a server of its own
pytestmark = pytest.mark.xdist_group("server")


@pytest.mark.timeout(900)
def test_the_lessons_run_unchanged_as_a_participant(workshop, home):
    settings, secrets = workshop.settings, workshop.secrets
    made = {}
    add(settings, secrets, ["lea", "finn"], made.update)
    with as_admin(settings, secrets):
        MlflowClient().create_registered_model("fashion-classifier")  # somebody else's, of the same name
    login = {"MLFLOW_TRACKING_URI": workshop.url, "MLFLOW_TRACKING_USERNAME": "lea"}
    done = subprocess.run(
        [sys.executable, "-m", "demo_lib", "run", "--jobs", "2", *TAKEN],
        env=os.environ | login | {"MLFLOW_TRACKING_PASSWORD": made["lea"]},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in TAKEN:
        page = BeautifulSoup((home / "build" / f"{name}.html").read_text(), "html.parser")
        words = [image.get("alt", "") for image in page.find_all("img")]
        assert len(words) == SHOWN[name][0] and all(len(each) > 60 for each in words), (name, words)
    table = progress(settings, secrets)
    assert (table.loc["lea", TAKEN] > 0).all()
    assert (table.loc["finn"].drop("last_activity") == 0).all()
    with as_admin(settings, secrets):
        champion = MlflowClient().get_model_version_by_alias("lea.fashion-classifier", "champion")
        assert champion.run_id and not MlflowClient().search_model_versions("name = 'fashion-classifier'")
        names = {experiment.name for experiment in mlflow.search_experiments()}
    assert not {name for name in names if name in LESSONS}
