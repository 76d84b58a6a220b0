"""A server that a notebook starts, and that is gone when the notebook's kernel is."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from contextlib import suppress
from typing import Self

from demo_lib.config import ROOT
from demo_lib.processes import LIBC, ProcessError, die_with_parent, wait_for_health

import psutil

from server.process import START_SECONDS, read_state, stop
from server.settings import PREFIX, Secrets, ServerError, ServerSettings


class BackgroundServer:
    """`python -m server start` in the background, until `stop()`.

    It stops as well at the end of its `with` block, when no variable holds it any more, and when the process that
    started it ends; on Linux also when that process is killed outright.
    """

    def __init__(self, settings: ServerSettings, process: psutil.Popen) -> None:
        self.settings = settings
        self._stop = weakref.finalize(self, _stop, settings, process)

    @property
    def url(self) -> str:
        """The server's address on this machine."""
        return self.settings.url

    def stop(self) -> None:
        """End the server and wait until it is gone; a second call does nothing."""
        self._stop()

    def break_down(self) -> None:
        """Kill `mlflow server` but not what supervises it, which starts it again."""
        psutil.Process(read_state(self.settings)["server"][0]).kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def launch(settings: ServerSettings, secrets: Secrets, seconds: float = START_SECONDS) -> BackgroundServer:
    """Run `python -m server start` with these settings and secrets, and return when the server answers.

    Raises:
        ServerError: it ended, with its own words, or does not answer within `seconds`.
    """
    settings.folder.mkdir(parents=True, exist_ok=True)
    log = settings.folder / "start.log"
    with log.open("wb") as output:
        process = psutil.Popen(
            [sys.executable, "-m", "server", "start"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(settings, secrets),
            cwd=ROOT,
            start_new_session=True,  # an interrupted cell must not take the server with it
            preexec_fn=die_with_parent if LIBC else None,
        )
    server = BackgroundServer(settings, process)
    try:
        wait_for_health(settings.url, process, seconds, ours=lambda: read_state(settings) is not None)
    except ProcessError as error:
        server.stop()
        said = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise ServerError(said.removeprefix("error: ") or f"the server {error}.") from None
    except BaseException:
        server.stop()
        raise
    return server


def _environment(settings: ServerSettings, secrets: Secrets) -> dict[str, str]:
    """Return this process's environment with exactly these settings: none of another server's here, or in its file."""
    nothing = settings.folder / "nothing.env"
    nothing.touch(mode=0o600)
    given = {name: str(value) for name, value in settings.model_dump().items()}
    known = {name: getattr(secrets, name) for name in Secrets.model_fields}
    given |= {name: value.get_secret_value() for name, value in known.items() if value is not None}
    given["env_file"] = str(nothing)
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}
    return kept | {f"{PREFIX}{name.upper()}": value for name, value in given.items()}


def _stop(settings: ServerSettings, process: psutil.Popen) -> None:
    """End the supervisor, which ends the rest; then what is left where it could not."""
    with suppress(psutil.NoSuchProcess):
        process.terminate()
    with suppress(psutil.TimeoutExpired):
        process.wait(60)
    stop(settings)
