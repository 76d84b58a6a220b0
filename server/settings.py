"""The server's settings: typed, from flags, the environment and a file; secrets never from flags."""

from __future__ import annotations

import os
import stat
from functools import cached_property
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from demo_lib.config import AbsolutePath, DemoError, explain, sqlite_uri
from demo_lib.config import settings as demo_settings

from pydantic import BaseModel, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "MLFLOW_DEMO_SERVER_"
ENV_FILE = Path(__file__).with_name("server.env")
SHORTEST_PASSWORD = 12  # MLflow's own limit, for every account
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServerError(DemoError):
    """The server can't be started, reached or used as it is set up."""


def _server_data() -> Path:
    return demo_settings().home / "server-data"


class ServerSettings(BaseModel, frozen=True):
    """How the server runs. `read_settings` takes each field from an environment variable or a flag as well."""

    profile: Literal["local", "workshop"] = Field("local", description="workshop: PostgreSQL, accounts, exact hosts")
    folder: AbsolutePath = Field(
        default_factory=_server_data,
        description="folder of the server's database, artifacts, log and state; server-data here or in DEMO_HOME",
    )
    host: str = Field("127.0.0.1", description="network interface to listen on")
    port: int = Field(5080, ge=1, le=65535, description="port to listen on")
    artifacts: str = Field("", description="folder or s3:// address of the artifacts; empty: in the folder")
    hosts: str = Field("", description="host names, with commas, by which clients reach the server through its proxy")
    origins: str = Field("", description="web origins, with commas, that may call it; empty: https:// and the hosts")
    x_frame_options: Literal["DENY", "SAMEORIGIN", "NONE"] = Field("DENY", description="who may frame the UI")
    workers: int = Field(0, ge=0, le=32, description="server processes; 0 is 1 with local and 2 with workshop")
    pool_size: int = Field(20, ge=1, le=200, description="open database connections a worker keeps")
    max_overflow: int = Field(80, ge=0, le=400, description="database connections a worker may open besides")
    admin_name: str = Field("admin", min_length=1, description="name of the administrator's account")

    @property
    def accounts(self) -> bool:
        """Whether clients must log in."""
        return self.profile == "workshop"

    @property
    def url(self) -> str:
        """The server's address on this machine."""
        return f"http://{'127.0.0.1' if self.host in ('0.0.0.0', 'localhost') else self.host}:{self.port}"

    @property
    def artifact_root(self) -> str:
        """Where the server keeps artifacts: a folder's absolute path, or an address."""
        if "://" in self.artifacts:
            return self.artifacts
        return str(Path(self.artifacts).absolute() if self.artifacts else self.folder / "artifacts")

    @property
    def allowed_hosts(self) -> list[str]:
        """Exact Host headers to answer: MLflow's default pattern 10.* would also match 10.evil.example."""
        here = [f"{name}{port}" for name in ("127.0.0.1", "localhost") for port in ("", f":{self.port}")]
        return [*here, *_split(self.hosts)]

    @property
    def allowed_origins(self) -> list[str]:
        """Exact web origins that may call the server from a browser."""
        here = [f"http://{name}:{self.port}" for name in ("127.0.0.1", "localhost")]
        return [*here, *(_split(self.origins) or [f"https://{name}" for name in _split(self.hosts)])]

    @property
    def worker_count(self) -> int:
        """How many server processes run: the profile `local` has SQLite, which takes one writer at a time."""
        return self.workers or (2 if self.profile == "workshop" else 1)

    @property
    def max_connections(self) -> int:
        """What PostgreSQL must allow: each worker has one pool for MLflow and one for accounts, and some are left."""
        return 2 * self.worker_count * (self.pool_size + self.max_overflow) + 20


class Secrets(BaseModel, frozen=True):
    """What must not be seen. `read_settings` takes it from the environment or a private file, never from flags."""

    database: SecretStr | None = Field(None, description="database address, with its password")
    admin_password: SecretStr | None = Field(None, description="the administrator's password")
    secret_key: SecretStr | None = Field(None, description="random text that signs the UI's forms")

    @cached_property
    def hidden(self) -> tuple[str, ...]:
        """Every text that no output may have."""
        given = (self.admin_password, self.secret_key)
        password = urlsplit(self.database.get_secret_value()).password if self.database else None
        return tuple(value.get_secret_value() for value in given if value) + ((password,) if password else ())


class _FromEnvironment(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", env_ignore_empty=True)


class SettingsFromEnvironment(ServerSettings, _FromEnvironment):
    """Settings whose missing values are looked for in the environment and a file."""


class _SecretsFromEnvironment(Secrets, _FromEnvironment):
    pass


def read_settings(**flags: object) -> tuple[ServerSettings, Secrets]:
    """Return settings and secrets: flags win over the environment, which wins over the file.

    The file is `server/server.env`, or what `MLFLOW_DEMO_SERVER_ENV_FILE` names.

    Raises:
        ServerError: a value is not allowed, or others can read the file.
    """
    named = os.environ.get(f"{PREFIX}ENV_FILE")
    path = Path(named) if named else ENV_FILE
    if named and not path.is_file():
        raise ServerError(f"{PREFIX}ENV_FILE names {path}, which is no file: correct or unset it.")
    if path.is_file() and os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ServerError(f"others can read {path}, which may hold secrets: chmod 600 {path}")
    try:
        return SettingsFromEnvironment(_env_file=path, **flags), _SecretsFromEnvironment(_env_file=path)
    except ValidationError as error:
        raise ServerError(explain(ServerSettings, error, prefix=PREFIX)) from None


def local_database(settings: ServerSettings) -> str:
    """Return the address of the SQLite database that the profile `local` uses unless another is set."""
    return sqlite_uri(settings.folder / "mlflow.db")


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
