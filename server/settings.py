"""The server's settings: typed, from flags, the environment and a file; secrets never from flags."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

from demo_lib.config import AbsolutePath, DemoError, explain, sqlite_uri
from demo_lib.config import settings as demo_settings

from dotenv.parser import parse_stream
from pydantic import AfterValidator, BaseModel, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

PREFIX = "MLFLOW_DEMO_SERVER_"
ENCODING = "utf-8-sig"  # of the file: some editors begin it with a mark
ENV_FILE = Path(__file__).with_name("server.env")
HERE = ("127.0.0.1", "localhost")


def _server_data() -> Path:
    return demo_settings().home / "server-data"


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _known(address: SecretStr | None) -> SecretStr | None:
    """Look at the form of a database's address, and show nothing of it: a wrong one may have its password anywhere."""
    text = address.get_secret_value() if address else "sqlite://"
    try:
        known = make_url(text).get_backend_name() in ("postgresql", "sqlite") and make_url(text).get_dialect()
    except (ArgumentError, ImportError, ValueError):
        known = False
    if not known or text.partition("?")[0].count("@") > 1:
        raise DemoError(
            f"{PREFIX}DATABASE is no address of a database: write postgresql://NAME:PASSWORD@HOST:5432/DATABASE or "
            "sqlite:////FOLDER/FILE, and @ : / # ? in the password as %40 %3A %2F %23 %3F."
        )
    return address


class Flags(BaseModel, frozen=True):
    """The settings that flags of the command line can give too."""

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


class ServerSettings(Flags, frozen=True):
    """How the server runs. The secrets among the settings print as asterisks, and are on no command line."""

    database: Annotated[SecretStr | None, AfterValidator(_known)] = Field(
        None, description="database address, with its password"
    )
    admin_password: SecretStr | None = Field(None, description="the administrator's password")
    secret_key: SecretStr | None = Field(None, description="random text that signs the UI's forms")

    @property
    def hidden(self) -> tuple[str, ...]:
        """Every text that no output may have."""
        password = urlsplit(self.database.get_secret_value()).password if self.database else None
        given = [value.get_secret_value() for value in (self.admin_password, self.secret_key) if value]
        return (*given, password, unquote(password)) if password else tuple(given)

    @property
    def address(self) -> str | None:
        """The database's address; None for a PostgreSQL of the server's own, whose address is known while it runs."""
        if self.database:
            return self.database.get_secret_value()
        return None if self.accounts else sqlite_uri(self.folder / "mlflow.db")

    @property
    def accounts(self) -> bool:
        """Whether clients must log in."""
        return self.profile == "workshop"

    @property
    def url(self) -> str:
        """The server's address on this machine."""
        return f"http://{'127.0.0.1' if self.host in ('0.0.0.0', 'localhost') else self.host}:{self.port}"

    @property
    def artifact_folder(self) -> Path | None:
        """The folder of the artifacts, None for an address such as S3's."""
        if "://" in self.artifacts:
            return None
        return Path(self.artifacts).expanduser().absolute() if self.artifacts else self.folder / "artifacts"

    @property
    def artifact_root(self) -> str:
        """Where the server keeps artifacts: a folder's absolute path, or an address."""
        return str(self.artifact_folder or self.artifacts)

    @property
    def allowed_hosts(self) -> str:
        """Exact Host headers to answer, with commas: MLflow's default 10.* would also match 10.evil.example."""
        return ",".join([*(f"{name}{port}" for name in HERE for port in ("", f":{self.port}")), *_split(self.hosts)])

    @property
    def allowed_origins(self) -> str:
        """Exact web origins, with commas, that may call the server from a browser."""
        given = _split(self.origins) or [f"https://{name}" for name in _split(self.hosts)]
        return ",".join([*(f"http://{name}:{self.port}" for name in HERE), *given])

    @property
    def worker_count(self) -> int:
        """How many server processes run: the profile `local` has SQLite, which takes one writer at a time."""
        return self.workers or (2 if self.accounts else 1)

    @property
    def max_connections(self) -> int:
        """What PostgreSQL must allow: each worker has one pool for MLflow and one for accounts, and some are left."""
        return 2 * self.worker_count * (self.pool_size + self.max_overflow) + 20


class FlagSettings(Flags, BaseSettings):
    """What the command line reads its flags by."""


class _FromEnvironment(ServerSettings, BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", env_ignore_empty=True)


def read_settings(**flags: object) -> ServerSettings:
    """Return the settings: flags win over the environment, which wins over the file.

    The file is `server/server.env`, or what `MLFLOW_DEMO_SERVER_ENV_FILE` names.

    Raises:
        DemoError: a value is not allowed, or the file can't be read, or others can read it.
    """
    named = os.environ.get(f"{PREFIX}ENV_FILE")
    path = Path(named or ENV_FILE)
    if path.is_file():
        _refuse_file(path)
    elif named and named != os.devnull:
        raise DemoError(f"{PREFIX}ENV_FILE names {path}, which is no file: correct or unset it.")
    try:
        return _FromEnvironment(_env_file=path, _env_file_encoding=ENCODING, **flags)
    except ValidationError as error:
        raise DemoError(explain(ServerSettings, error, prefix=PREFIX)) from None


def _refuse_file(path: Path) -> None:
    """Look at who can read it, and for a line that can't be read: it would be left out, with the setting in it."""
    if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise DemoError(f"others can read {path}, which may hold secrets: chmod 600 {path}")
    try:
        with path.open(encoding=ENCODING) as file:
            bad = next((binding.original.line for binding in parse_stream(file) if binding.error), None)
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"{path} can't be read ({error}): save it as UTF-8, readable for you.") from None
    if bad is not None:
        raise DemoError(f"{path}, line {bad} can't be read: write NAME=value, a value with signs in single quotes.")
