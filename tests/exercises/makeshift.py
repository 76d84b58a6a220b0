"""Things that look in the store like what an exercise makes, without the seconds that it takes."""

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import numpy as np
from mlflow.entities import LoggedModelOutput
from mlflow.models import Model, infer_signature


def log_model(name, step=0, signature=None, **tags):
    """Log a model without files, or with the one that holds its signature, to the active run."""
    run = mlflow.active_run()
    client = mlflow.MlflowClient()
    model = client.create_logged_model(run.info.experiment_id, name, run.info.run_id, tags=tags or None)
    if signature:
        with TemporaryDirectory() as folder:
            Model(signature=signature).save(Path(folder, "MLmodel"))
            client.log_model_artifact(model.model_id, str(Path(folder, "MLmodel")))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step)])
    return model


def register(name, model, alias=None, description=None):
    """Register a logged model that may have no files, and return its version."""
    client = mlflow.MlflowClient()
    with suppress(mlflow.MlflowException):  # it is there already
        client.create_registered_model(name)
    source = f"models:/{model.model_id}"
    version = client.create_model_version(
        name, source, model.source_run_id, description=description, model_id=model.model_id
    ).version
    if alias:
        client.set_registered_model_alias(name, alias, version)
    return version


def setup_runs(number):
    """Return the runs that the setup of the exercise has made, the first first; their copies are none."""
    found = mlflow.search_runs(filter_string=f"tags.setup = '{number}'", output_format="list")
    return [run for run in reversed(found) if "copied_from" not in run.data.tags]


def describe(model, whole=True):
    """Give a logged model the file that says what it takes; without `whole`, one that says next to nothing."""
    about = Model(model_uuid=model.model_id)
    if whole:
        about.signature = infer_signature(np.zeros((2, 3)))
        about.saved_input_example_info = {"artifact_path": "input_example.json", "type": "ndarray"}
    with TemporaryDirectory() as folder:
        about.save(Path(folder, "MLmodel"))
        mlflow.MlflowClient().log_model_artifacts(model.model_id, folder)


def log_family(setup, trials):
    """Log a parent with the tag `setup`, and a child for each dictionary; return the parent's id and the children's."""
    ids = []
    with mlflow.start_run(run_name="search", tags={"setup": setup}) as parent:
        mlflow.log_param("channels", 8)
        mlflow.log_metric("val_accuracy", 0.8)
        for number, values in enumerate(trials):
            metrics = {"val_accuracy": values["val_accuracy"], "val_loss": 0.5}
            params = {name: value for name, value in values.items() if name not in ("val_accuracy", "status")}
            with mlflow.start_run(run_name=f"trial {number}", nested=True, tags={"setup": setup}) as run:
                mlflow.log_params(params)
                mlflow.log_metrics(metrics)
                mlflow.end_run(values.get("status", "FINISHED"))
            ids.append(run.info.run_id)
    return parent.info.run_id, ids
