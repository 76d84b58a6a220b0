"""A hunt on a server with accounts, with a participant's rights."""

from demo_lib.exercises import check, hunt
from demo_lib.exercises.faults import plan

import mlflow
import pytest
from mlflow import MlflowClient

pytestmark = pytest.mark.xdist_group("server")


def test_a_participant_makes_a_hunt_and_solves_it(workshop, people, login, capfd):
    for name in ("ann", "bob"):  # both have one of the same seed, and of the same name for each
        login(name, people[name])
        made = hunt(5)
        assert made.made and made.model == f"{name}.hunt-5" and not hunt(5).made
        assert check("03.3").answer == "not attempted"
        guilty = {run.name: run.fault for run in plan(5, 6) if run.fault}
        runs = mlflow.search_runs(experiment_names=[f"{name}/hunt"], output_format="list")
        assert len(runs) == made.runs
        for run in runs:
            if kind := guilty.get(run.info.run_name):
                MlflowClient().set_tag(run.info.run_id, "fault", kind)
        assert check("03.3").answer == "passed"
        version = MlflowClient().get_model_version_by_alias(made.model, "champion")
        assert version.run_id in {run.info.run_id for run in runs}
    assert not capfd.readouterr().err
