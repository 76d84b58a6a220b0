"""The small library behind the lessons of the MLflow demo series.

Importing it sets defaults for a quiet MLflow, each of which the environment overrides: warnings instead of log lines,
no progress bar for artifacts, no hints for coding agents, and no usage telemetry to MLflow's makers. MLflow reads
some of them when it is imported, so import `demo_lib` first.
"""

import os

for _name, _value in {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "GIT_PYTHON_REFRESH": "quiet",  # a machine without git still imports MLflow and loses only the commit
}.items():
    os.environ.setdefault(_name, _value)
