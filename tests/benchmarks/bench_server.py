"""Measure what a server takes: `python -m tests.benchmarks.bench_server [--output FILE] [--only ...]`.

Clients in processes of their own log to this project's server, and then to a plain `mlflow server` with its defaults,
one server at a time in one run; what arrived is counted in the database. Leave the machine alone meanwhile.
"""

import argparse
import json
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from demo_lib.config import ROOT, sqlite_uri
from demo_lib.ops.guard import end_group
from demo_lib.ops.processes import free_port

from pydantic import SecretStr

from server.database import database, database_address
from server.process import running
from server.settings import ServerSettings
from tests.benchmarks.rows import machine, table
from tests.tools.load import STOPPED, Outcome, Target, load
from tests.tools.processes import serving

CLIENTS = (20, 50, 100)
SECONDS = 400  # after which clients are stopped: those of a plain server may wait for half an hour
HEADER = ["server", "clients", "logging", "lost", "seconds", "slowest call", "400 or 500", "unfinished"]


@contextmanager
def ours(profile: str, folder: Path) -> Iterator[Target]:
    """Run this project's server."""
    drawn = {name: SecretStr(secrets.token_urlsafe(16)) for name in ("admin_password", "secret_key")}
    settings = ServerSettings(profile=profile, folder=folder, port=free_port(), **drawn)
    admin = (settings.admin_name, settings.admin_password.get_secret_value()) if settings.accounts else None
    with running(settings):
        yield Target(settings.url, database_address(settings), settings.artifact_root, admin)


@contextmanager
def plain(profile: str, folder: Path) -> Iterator[Target]:
    """Run `mlflow server` with its defaults, on the SQLite file that it makes or on a PostgreSQL like ours."""
    port = free_port()
    command, url = [sys.executable, "-m", "mlflow", "server", "--port", str(port)], f"http://127.0.0.1:{port}"
    with database(ServerSettings(profile=profile, folder=folder)) as (address, postgres):
        if postgres is None:
            address = sqlite_uri(folder / "mlflow.db")
        else:
            command += ["--backend-store-uri", address]
        with serving(command, f"{url}/health", cwd=folder) as process:
            try:
                yield Target(url, address, str(folder / "mlartifacts"))
            finally:
                end_group(process.pid)


SERVERS = {
    "workshop": (ours, "workshop"),
    "mlflow server, PostgreSQL": (plain, "workshop"),
    "local": (ours, "local"),
    "mlflow server, SQLite": (plain, "local"),
}


def cells(name: str, asynchronous: bool, outcome: Outcome) -> list[str]:
    """Return what a load gave as texts for the table."""
    shown = [name, str(outcome.clients), "asynchronous" if asynchronous else "synchronous"]
    seconds = f"{outcome.seconds:.1f}" + (" (stopped)" if STOPPED in outcome.errors else "")
    shown += [f"{outcome.lost / outcome.sent:.1%}", seconds, f"{outcome.slowest:.1f} s"]
    return [*shown, str(outcome.bad_answers), str(outcome.unfinished)]


def measure(name: str, counts: list[int], limit: float) -> Iterator[tuple[bool, Outcome]]:
    """Yield what each number of clients meets on a new server, logging synchronously and asynchronously."""
    run, profile = SERVERS[name]
    with (
        tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder,
        run(profile, Path(folder)) as target,
    ):
        for clients in counts:
            for asynchronous in (False, True):
                yield asynchronous, load(target, clients, clients if asynchronous else 0, limit=limit)


def main() -> None:
    """Measure the servers, print the table and save it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_server", description="Load servers.")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench_server.json", help="JSON file to write")
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS), help="how many log at once")
    parser.add_argument("--only", nargs="+", choices=SERVERS, default=list(SERVERS), help="servers to measure")
    parser.add_argument("--limit", type=float, default=SECONDS, help="seconds after which a load is stopped")
    options = parser.parse_args()
    facts, rows, lines = machine(), [], [HEADER]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        for asynchronous, outcome in measure(name, options.clients, options.limit):
            lines.append(cells(name, asynchronous, outcome))
            print("  ".join(lines[-1]), file=sys.stderr, flush=True)
            rows.append({"server": name, "asynchronous": asynchronous, "lost": outcome.lost} | asdict(outcome))
            report = {"machine": facts, "rows": rows}
            options.output.write_text(json.dumps(report, indent=2), encoding="utf-8")
    print(table(lines, "<><>>>>>"), "", *(f"{name}: {value}" for name, value in facts.items()), sep="\n")
    print(f"\nsaved in {options.output}")


if __name__ == "__main__":
    main()
