"""Ask the server, as its administrator or as somebody else."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import mlflow
import requests

from server.settings import Secrets, ServerError, ServerSettings

if TYPE_CHECKING:
    from mlflow.server.auth.client import AuthServiceClient


def call(
    settings: ServerSettings, secrets: Secrets | None, method: str, path: str, timeout: float = 20, **options: object
) -> requests.Response:
    """Send one request as the administrator, or without secrets as nobody, at once; `path` starts with a slash.

    Raises:
        ServerError: nobody answers.
    """
    try:
        return requests.request(
            method,
            settings.url + path,
            auth=_login(settings, secrets) if secrets else None,
            timeout=timeout,
            allow_redirects=False,
            **options,
        )
    except requests.RequestException:
        raise ServerError(f"no server answers at {settings.url}: start it with `python -m server start`.") from None


@contextmanager
def signed_in(url: str, name: str, password: str) -> Iterator[None]:
    """Point MLflow's clients in this process at the server, with this person's login, until the block ends."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    before = {name: os.environ.get(name) for name in names}
    uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    try:
        os.environ |= {names[1]: name, names[2]: password}
        mlflow.set_tracking_uri(url)
        yield
    finally:
        mlflow.set_tracking_uri(uri)
        for each, value in before.items():
            os.environ.pop(each, None)
            if value is not None:
                os.environ[each] = value


@contextmanager
def as_admin(settings: ServerSettings, secrets: Secrets) -> Iterator[str]:
    """Point MLflow's clients in this process at the server, as its administrator, until the block ends."""
    with signed_in(settings.url, *(_login(settings, secrets) or ("", ""))):
        yield settings.url


def account_client(url: str) -> AuthServiceClient:
    """Return MLflow's client for accounts and permissions, which asks as whoever is signed in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's server, imported with it, uses what Starlette deprecates
        from mlflow.server.auth.client import AuthServiceClient
    return AuthServiceClient(url)


def _login(settings: ServerSettings, secrets: Secrets) -> tuple[str, str] | None:
    if not settings.accounts:
        return None
    if secrets.admin_password is None:
        raise ServerError(
            "the administrator's password is not known: set MLFLOW_DEMO_SERVER_ADMIN_PASSWORD as for `start`."
        )
    return settings.admin_name, secrets.admin_password.get_secret_value()
