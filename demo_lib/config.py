"""Configurations: validated, frozen, from YAML, the command line or a run's parameters, and back to YAML."""

import errno
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ROOT / "notebooks"


def _absolute(path: Path) -> Path:
    """Replace ~ and $VARIABLE, as a shell would where the value comes from a file; raise nothing for unknown ones."""
    return Path(os.path.expandvars(os.path.expanduser(path))).absolute()  # noqa: PTH111


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class DemoError(Exception):
    """Something the user can fix; the message is one sentence that says what is wrong and what to do."""

    def _render_traceback_(self) -> list[str]:
        """Show only the sentence in a notebook: IPython asks for this method before it prints a traceback."""
        return [f"{type(self).__name__}: {self}"]


def refuse_lost_folder() -> None:
    """Raise a DemoError if the folder that this process works in was deleted: libraries then fail in odd ways."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise DemoError("the folder that you are in was deleted: change to one that is there.") from None


def lessons() -> list[Path]:
    """Return the notebooks of all lessons in order; none, as in a plain `pip install .`, is a DemoError."""
    if found := sorted(LESSONS.glob("[0-9][0-9]_*.ipynb")):
        return found
    raise DemoError(f"the lessons are not in {LESSONS}: clone the repository, and there run `make setup`.")


@contextmanager
def whole_file(path: Path, private: bool = False) -> Iterator[Path]:
    """Give a path to write to that becomes `path` at the end: whole or not at all; private, for its owner only.

    A `path` that is a folder or a device is an OSError: a file would take its place.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file")
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        if private:
            partial.touch(mode=0o600)
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write the file that the user named, as `whole_file` does; one that can't be written is a DemoError."""
    try:
        with whole_file(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise DemoError(f"{path} can't be written ({error.strerror}): name a file in a folder that can be.") from None


@contextmanager
def restored_variables(*names: str) -> Iterator[None]:
    """Give these environment variables back the values they have now, when the block ends."""
    before = {name: os.environ[name] for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ |= before


class Settings(BaseSettings):
    """Where this machine keeps things, from `DEMO_*` environment variables; never part of a run's configuration."""

    model_config = SettingsConfigDict(env_prefix="DEMO_", env_ignore_empty=True, frozen=True)

    home: AbsolutePath = Field(ROOT, description="folder that holds store/, data/ and build/")
    data_dir: AbsolutePath | None = Field(None, description="folder with the four Fashion-MNIST files, looked in first")
    download: bool = Field(True, description="whether the data may be downloaded when it is not on this machine")
    ui_port: int = Field(5050, ge=1, le=65535, description="port of the MLflow UI (5000 is AirPlay's on macOS)")
    storage: str = Field("", description="database of Optuna's studies; empty: store/optuna.db in the home")
    batch_id: str = Field("", description="set by the batch run for the lessons that it starts")


def settings() -> Settings:
    """Read the settings from the environment now; a `DEMO_*` variable with a wrong value is a DemoError."""
    try:
        return Settings()
    except ValidationError as error:
        raise DemoError(explain(Settings, error, prefix="DEMO_")) from None


def tracking_uri() -> str:
    """Return the address of the store: `MLFLOW_TRACKING_URI`, else the SQLite file; SQLite paths made absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or sqlite_uri(settings().home / "store" / "mlflow.db")
    return uri if (database := sqlite_file(uri)) is None else sqlite_uri(database)


def sqlite_file(uri: str) -> Path | None:
    """Return the absolute path of a SQLite database, None for any other address."""
    found = re.match(r"sqlite(?:\+\w+)?:///(.+)", uri, re.DOTALL)
    return Path(os.path.expanduser(found[1])).absolute() if found else None  # noqa: PTH111


def sqlite_uri(database: Path) -> str:
    """Return the address of a SQLite store, which can't say every path."""
    if database.name == ":memory:":
        raise DemoError("a database in memory is gone with its process: name a file.")
    if not str(database).isprintable():
        todo = "rename the folder or, for letters such as ü, set LC_ALL=C.UTF-8"
        raise DemoError(f"the path {str(database)!r} has signs that can't be used: {todo}.")
    if {"?", "%"} & {*str(database)}:
        raise DemoError(f"the database {database} can't be used: leave ? and % out of its address, and of its path.")
    return f"sqlite:///{database.as_posix()}"


def without_login(uri: str) -> str:
    """Return the address as it may be shown: without a name and a password."""
    return re.sub("//.*@|(?<=password=)[^&]*", lambda found: "//" if found[0].startswith("//") else "***", uri)


class Config(BaseModel):
    """Base of the configurations: frozen, no unknown fields; a bad name or value is a DemoError."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_strip_whitespace=True)

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, values: Any, handler: Any) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            raise DemoError(explain(cls, error)) from None

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """Take the fields from a run's parameters, or a notebook's `globals()`; other names are left out."""
        return cls(**{name: value for name, value in params.items() if name in cls.model_fields})

    def to_yaml(self) -> str:
        """Return the configuration as YAML that papermill's `-f` accepts."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


class TrainConfig(Config):
    """One training run. The defaults are the quick ones: seconds on a laptop's CPU."""

    train_images: int = Field(3_000, ge=200, le=60_000, description="images to train and validate on, at most")
    epochs: int = Field(8, ge=1, le=100, description="passes over the training images")
    batch_size: int = Field(128, ge=8, le=4096, description="images per optimizer step")
    learning_rate: float = Field(0.012, ge=1e-6, le=1.0, description="peak of the one-cycle schedule")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW's weight decay")
    channels: int = Field(16, ge=4, le=128, description="width of the first convolution, others 2 to 6 times as wide")
    dropout: float = Field(0.0, ge=0, le=0.9, description="share of features dropped before the last layer")
    flip: bool = Field(False, description="mirror each training image with probability 1/2, drawn anew each epoch")
    log_every: int = Field(10, ge=1, le=10_000, description="optimizer steps between two logged losses")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seeds splits, weights, batches and dropout")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto takes the fastest there is")


class TuneConfig(Config):
    """One study of nested runs. What the study does not vary is fixed here; the defaults are the quick ones."""

    study: str = Field("fashion", min_length=1, description="name of the study, by which it is resumed")
    trials: int = Field(10, ge=1, le=10_000, description="trials of the whole study, pruned ones included")
    workers: int = Field(1, ge=0, le=64, description="processes that do trials at once; 0: only those that join")
    max_channels: int = Field(16, ge=4, le=128, description="widest first convolution to try")
    train_images: int = Field(2_000, ge=200, le=60_000, description="images to train and validate on, at most")
    epochs: int = Field(3, ge=1, le=100, description="passes over the training images in each trial")
    prune: bool = Field(True, description="stop trials that do worse than half of the others")
    log_every: int = Field(10, ge=1, le=10_000, description="optimizer steps between two logged losses")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seeds each trial's training, and a single worker's sampler")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto takes the fastest there is")

    def train_config(self, **suggested: Any) -> TrainConfig:
        """Return the configuration of one trial: the fixed values and the suggested ones."""
        return TrainConfig(**self.model_dump(include=set(TrainConfig.model_fields)) | suggested)


def load_yaml(path: str | Path) -> Any:
    """Return what a YAML file holds; one that can't be read is a DemoError."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DemoError(f"{path} can't be read as YAML ({' '.join(str(error).split())}): correct it.") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of `name: value` lines; a file that can't be read or is no such mapping is a DemoError."""
    values = load_yaml(path) or {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise DemoError(f"{path} must hold one `name: value` a line, each name a word.")
    return values


def explain(cls: type[BaseModel], error: ValidationError, prefix: str = "") -> str:
    """Turn a model's first error into one sentence that names the field, its value and what is allowed."""
    detail = error.errors()[0]
    name, allowed = str(detail["loc"][0]), detail["msg"].replace("Input", "it").replace("String", "it")
    if name not in cls.model_fields:
        return f"{cls.__name__} has no field {name!r}; it has {', '.join(cls.model_fields)}."
    return f"{f'{prefix}{name.upper()}' if prefix else name} = {detail['input']!r} is not allowed: {allowed}."
