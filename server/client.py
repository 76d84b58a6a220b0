"""Ask the server, as its administrator or as somebody else."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from demo_lib.config import DemoError, restored_variables

import mlflow
import requests

from server.settings import PREFIX, ServerSettings


def call(settings: ServerSettings, method: str, path: str, nobody: bool = False, **options: Any) -> requests.Response:
    """Send one request, at once, as the administrator or as nobody; a `DemoError` if no server answers, or refuses."""
    login = (None if nobody else _login(settings)) or (lambda request: request)  # without one, requests asks a netrc
    options = {"auth": login, "timeout": 20, "allow_redirects": False} | options
    try:
        answer = requests.request(method, settings.url + path, **options)
    except requests.RequestException:
        raise DemoError(f"no server answers at {settings.url}: start it with `python -m server start`.") from None
    if answer.status_code == 401 and not nobody:
        raise DemoError(f"the administrator's password is refused: set {PREFIX}ADMIN_PASSWORD as for the first start.")
    return answer


@contextmanager
def signed_in(url: str, name: str, password: str) -> Iterator[None]:
    """Point MLflow's clients in this process at the server, with this person's login, until the block ends."""
    # A login in the user's netrc would go before MLflow's.
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "NETRC")
    uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    with restored_variables(*names):
        try:
            os.environ |= {names[1]: name, names[2]: password, names[3]: os.devnull}
            mlflow.set_tracking_uri(url)
            yield
        finally:
            mlflow.set_tracking_uri(uri)


@contextmanager
def as_admin(settings: ServerSettings) -> Iterator[None]:
    """Point MLflow's clients in this process at the server, as its administrator, until the block ends."""
    with signed_in(settings.url, *(_login(settings) or ("", ""))):
        yield


def account_client(url: str) -> mlflow.server.auth.client.AuthServiceClient:
    """Return MLflow's client for accounts and permissions, which asks as whoever is signed in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's server, imported with it, uses what Starlette deprecates
        from mlflow.server.auth.client import AuthServiceClient
    return AuthServiceClient(url)


def _login(settings: ServerSettings) -> tuple[str, str] | None:
    if not settings.accounts:
        return None
    if settings.admin_password is None:
        raise DemoError(f"the administrator's password is not known: set {PREFIX}ADMIN_PASSWORD as for `start`.")
    return settings.admin_name, settings.admin_password.get_secret_value()
