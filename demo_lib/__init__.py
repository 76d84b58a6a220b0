"""The small library behind the lessons of the MLflow demo series.

Importing it sets defaults for PyTorch and for a quiet MLflow, without usage telemetry to its makers; the environment
overrides each. Libraries read them when they are imported, so import `demo_lib` first. It also takes out of the
environment what would send this machine's own requests, or the lessons' models, elsewhere.
"""

import gc
import os
from urllib.request import getproxies

for _name, _value in {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    # PyTorch's threads spin while they wait for each other, which makes training ten times slower on a busy machine.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",  # GNU's OpenMP: spin for microseconds only; not at all costs 15% on an idle machine
    "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu",  # networks are logged on the CPU; MLflow would load them on a GPU
    "GIT_PYTHON_REFRESH": "quiet",  # a machine without git still imports MLflow and loses only the commit
}.items():
    os.environ.setdefault(_name, _value)

# The lessons' models belong in the store of their runs, not in production; their metrics to their own models.
for _name in ("MLFLOW_REGISTRY_URI", "MLFLOW_ACTIVE_MODEL_ID"):
    os.environ.pop(_name, None)

# A proxy, of the environment or of the system's settings, can't reach this machine's own servers.
_proxies = getproxies()
_direct = [*filter(None, _proxies.pop("no", "").split(",")), "127.0.0.1", "localhost"]
if _proxies and _direct[0] != "*":
    os.environ |= {f"{_scheme}_proxy": _address for _scheme, _address in _proxies.items()}
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys(_direct))

# With Python's 700 or 2,000, looking for garbage is a sixth of the time that imports take.
if 0 < gc.get_threshold()[0] < 10_000:
    gc.set_threshold(10_000)
