"""A server that a notebook starts, and that is gone when the notebook's kernel is."""

import os
import sys

from demo_lib.config import ROOT, DemoError
from demo_lib.ops.processes import OwnedProcess

import psutil
from pydantic import SecretStr

from server.process import START_SECONDS, read_state, refuse, stop
from server.settings import PREFIX, ServerSettings


class BackgroundServer(OwnedProcess):
    """`python -m server start`, with its output in the folder's `start.log`, which ends as any `OwnedProcess` does."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings, self.url = settings, settings.url
        # Exactly these settings: none of another server's in this process's environment, or in its file.
        given = {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}
        for name, value in [("env_file", os.devnull), *settings]:
            if value is not None:
                text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
                given[f"{PREFIX}{name.upper()}"] = text
        command = [sys.executable, "-m", "server", "start"]
        with (settings.folder / "start.log").open("wb") as log:  # patience: PostgreSQL may take its time to end
            super().__init__(command, log, given, ROOT, patience=60)

    def stop(self) -> None:
        """End the server, and what is left where its supervisor could not; a second call does nothing."""
        if self._stop.alive:
            super().stop()
            stop(self.settings)

    def break_down(self) -> None:
        """Kill `mlflow server` but not what supervises it, which starts it again."""
        psutil.Process(read_state(self.settings)["server"]).kill()


def launch(settings: ServerSettings) -> BackgroundServer:
    """Start a server, and return when it answers; a `DemoError`, in its own words, if it is refused or ends."""
    refuse(settings)
    server = BackgroundServer(settings)
    try:
        server.wait_for_health(settings.url, START_SECONDS, ours=lambda: read_state(settings) is not None)
    except DemoError as error:
        log = settings.folder / "start.log"
        said = log.read_text(errors="replace").strip().rpartition("\n")[2]
        refusal = said.removeprefix("error: ") if said.startswith("error: ") else None
        raise DemoError(refusal or f"the server {error}: look into {log}.") from None
    return server
