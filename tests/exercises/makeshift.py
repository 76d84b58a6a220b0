"""Things that look in the store like what an exercise makes, without the seconds that it takes."""

from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow.entities import LoggedModelOutput
from mlflow.models import Model


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
