"""The parts of MLflow that it does not promise to keep, each as it was in MLflow 3.17.2, and what each is for.

They are imported where they are used: some take a second to load. `tests/unit/test_internals.py` names the part that
another MLflow has changed.
"""

from __future__ import annotations

from typing import Any

import requests
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request


def login(uri: str) -> str:
    """Return the user name that MLflow sends to a server, from the environment or its credentials file, or ""."""
    return (get_default_host_creds(uri).username or "") if uri.startswith("http") else ""


def ask(uri: str, endpoint: str, **options: Any) -> requests.Response:
    """Send one request as MLflow's client does, with its login, but once: the client itself tries again for minutes."""
    return http_request(get_default_host_creds(uri), endpoint, "POST", max_retries=0, **options)


def make_store(uri: str, artifacts: str) -> None:
    """Make the tables of a new store: the public way to them is a whole server."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(uri, artifacts)._dispose_engine()
