"""The server's settings: typed, from flags, the environment and a file; secrets never from flags."""

import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from demo_lib.config import AbsolutePath, DemoError, explain, sqlite_uri
from demo_lib.config import settings as demo_settings

from dotenv.parser import parse_stream
from pydantic import AfterValidator, BaseModel, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

PREFIX = "MLFLOW_DEMO_SERVER_"
ENV_FILE = Path(__file__).with_name("server.env")
BESIDES = ("ENV_FILE", "POSTGRES_PASSWORD", "S3_KEY")  # variables that are no settings; compose.yaml takes two


def _known(address: SecretStr) -> SecretStr:
    """Look at the form of a database's address, and show nothing of it: a wrong one may have its password anywhere."""
    text = address.get_secret_value()
    with suppress(ArgumentError, ValueError):
        if make_url(text).get_backend_name() in ("postgresql", "sqlite") and text.partition("?")[0].count("@") < 2:
            return address
    raise DemoError(
        f"{PREFIX}DATABASE is no address of a database: write postgresql://NAME:PASSWORD@HOST:5432/DATABASE or "
        "sqlite:////FOLDER/FILE, and @ : / # ? in the password as %40 %3A %2F %23 %3F."
    )


def _host(name: str) -> str:
    """Look at the form of a host, which is part of the server's address: IPv6 has another one there."""
    if re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*", name):
        return name
    raise DemoError(f"{PREFIX}HOST = {name!r} is no IPv4 address and no name: write 127.0.0.1, or 0.0.0.0 for all.")


def _hosts(names: str) -> str:
    """Look at the form of the hosts: MLflow compares them as they are, so that a whole address fits nothing."""
    for name in filter(None, map(str.strip, names.split(","))):
        if not re.fullmatch(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?", name):
            raise DemoError(
                f"{PREFIX}HOSTS has {name!r}, which is no name: write mlflow.example.org, without https://."
            )
    return names


class Flags(BaseModel, frozen=True):
    """The settings that flags of the command line can give too."""

    profile: Literal["local", "workshop"] = Field("local", description="workshop: PostgreSQL, accounts, exact hosts")
    folder: AbsolutePath = Field(
        default_factory=lambda: demo_settings().home / "server-data",
        description="folder of database, artifacts, log and state",
    )
    host: Annotated[str, AfterValidator(_host)] = Field("127.0.0.1", description="network interface to listen on")
    port: int = Field(5080, ge=1, le=65535, description="port to listen on")
    artifacts: str = Field("", description="folder or s3:// address of the artifacts; empty: in the folder")
    hosts: Annotated[str, AfterValidator(_hosts)] = Field(
        "", description="host names, with commas, by which clients reach the server through its proxy"
    )
    x_frame_options: Literal["DENY", "SAMEORIGIN", "NONE"] = Field("DENY", description="who may frame the UI")
    workers: int = Field(0, ge=0, le=32, description="server processes; 0 is 1 with local and 2 with workshop")
    pool_size: int = Field(20, ge=1, le=200, description="open database connections a worker keeps")
    max_overflow: int = Field(80, ge=0, le=400, description="database connections a worker may open besides")
    studies: bool = Field(False, description="let Optuna's workers in to a database of the workshop's PostgreSQL")
    studies_port: int = Field(5432, ge=1, le=65535, description="port for them")
    admin_name: str = Field("admin", min_length=1, description="name of the administrator's account")


class ServerSettings(Flags, frozen=True):
    """How the server runs. The secrets among the settings print as asterisks, and are on no command line."""

    database: Annotated[SecretStr, AfterValidator(_known)] | None = None
    admin_password: SecretStr | None = None
    secret_key: SecretStr | None = None
    studies_password: SecretStr | None = None

    @property
    def hidden(self) -> list[str]:
        """Every text that no output may have."""
        return [value.get_secret_value() for _, value in self if isinstance(value, SecretStr)]

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
    def worker_count(self) -> int:
        """How many server processes run: the profile `local` has SQLite, which takes one writer at a time."""
        return self.workers or (2 if self.accounts else 1)

    @property
    def max_connections(self) -> int:
        """What PostgreSQL must allow: each worker has one pool for MLflow and one for accounts, and some are left."""
        studies = 100 if self.studies else 0
        return 2 * self.worker_count * (self.pool_size + self.max_overflow) + 20 + studies


class _FromEnvironment(ServerSettings, BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", env_ignore_empty=True)


def read_settings(**flags: object) -> ServerSettings:
    """Return the settings, flags before environment before file.

    Raises:
        DemoError: a value is bad, a name is no setting's, or the file is unsafe or can't be read.
    """
    named = os.environ.get(f"{PREFIX}ENV_FILE")
    path = Path(named or ENV_FILE)
    if named and named != os.devnull and not path.is_file():
        raise DemoError(f"{PREFIX}ENV_FILE names {path}, which is no file: correct or unset it.")
    if os.name == "posix" and path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise DemoError(f"others can read {path}, which may hold secrets: chmod 600 {path}")
    try:
        _check_names("the environment", os.environ)
        _check_names(str(path), _names(path) if path.is_file() else ())
        # Some editors begin UTF-8 with a mark.
        return _FromEnvironment(_env_file=path, _env_file_encoding="utf-8-sig", **flags)
    except ValidationError as error:
        raise DemoError(explain(ServerSettings, error, prefix=PREFIX)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"{path} can't be read ({error}): save it as UTF-8, readable for you.") from None


def _names(path: Path) -> list[str]:
    """Return the names in the file; what python-dotenv can't read it would leave out."""
    with path.open(encoding="utf-8-sig") as file:
        read = list(parse_stream(file))
    if bad := [each.original for each in read if each.error or (each.key and each.value is None)]:
        text, line = bad[0]
        line += text[: -len(text.lstrip())].count("\n")  # empty lines before it are in the text
        raise DemoError(f"line {line} of {path} can't be read: write NAME=value.")
    return [each.key for each in read if each.key]


def _check_names(place: str, names: Iterable[str]) -> None:
    """Raise a `DemoError` for a name that only looks like a setting's: mistyped, it would change nothing."""
    known = {f"{PREFIX}{name.upper()}" for name in [*ServerSettings.model_fields, *BESIDES]}
    ours = sorted(name for name in names if name.upper().startswith("MLFLOW_DEMO_"))
    if unknown := [name for name in ours if name.upper() not in known]:
        raise DemoError(f"{unknown[0]} in {place} is no setting: correct it as in server/example.env, or remove it.")
