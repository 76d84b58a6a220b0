"""Load for a tracking server: clients in processes of their own log through MLflow's client, then the store is counted.

`python -m tests.tools.load` reads what to do from stdin, as JSON since it may hold passwords; the function `load` runs
it. Each client is a fork of one process that has imported MLflow, so that 100 of them cost no 100 imports.
"""

import json
import logging
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from demo_lib.config import ROOT

import mlflow
import requests
import sqlalchemy

METRICS, ALONE, BATCH = 200, 20, 20  # values a client logs: some one by one, the others so many a call
PARAMS = {f"param_{number}": number for number in range(5)}
METRIC, ARTIFACT = "loss", "notes.txt"
LIMIT = 600  # seconds for the slowest client: MLflow's own retries give up after 250
STOPPED = "stopped"


@dataclass(frozen=True)
class Target:
    """A server, and where it keeps what it is sent: `admin` is a name and a password, or None without accounts."""

    url: str
    database: str
    artifacts: str
    admin: tuple[str, str] | None = None


@dataclass(frozen=True)
class Outcome:
    """What a load sent, and what of it arrived."""

    clients: int
    seconds: float
    slowest: float  # seconds of one call, with its retries
    answers: dict[int, int]  # how often each status that is an error came; 0: no answer
    errors: list[str]  # what clients raised
    sent: int
    arrived: int
    repeated: int
    unfinished: int
    incomplete: int  # runs without all of their parameters or their artifact

    @property
    def lost(self) -> int:
        """How many metric values did not arrive."""
        return self.sent - self.arrived

    @property
    def bad_answers(self) -> int:
        """How many answers were 400 or 500."""
        return self.answers.get(400, 0) + self.answers.get(500, 0)


def load(target: Target, clients: int, asynchronous: int = 0, pause: float = 0, limit: float = LIMIT) -> Outcome:
    """Log a run from each of the clients at once, and count what arrived.

    So many of them as `asynchronous` says log with `synchronous=False`; all wait `pause` seconds between their calls.
    A client that has not ended after `limit` seconds is stopped, and its error says so.
    """
    job = {"target": asdict(target), "clients": clients, "asynchronous": asynchronous, "pause": pause, "limit": limit}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING")}
    found = subprocess.run(
        [sys.executable, "-m", "tests.tools.load"],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment,
    )
    reports = json.loads(found.stdout)
    stored = count(target, [report["experiment"] for report in reports])
    answers = Counter(status for report in reports for status in report["statuses"])
    return Outcome(
        clients=clients,
        seconds=max(each["ended"] for each in reports) - min(each["started"] for each in reports),
        slowest=max(report["slowest"] for report in reports),
        answers=dict(answers),
        errors=[report["error"] for report in reports if report["error"]],
        sent=clients * METRICS,
        **stored,
    )


def count(target: Target, experiments: list[str]) -> dict[str, int]:
    """Ask the database, not the server, what arrived in the experiments; each has one run."""
    engine = sqlalchemy.create_engine(target.database)
    chosen = {"ids": [int(each) for each in experiments]}
    with engine.connect() as connection:
        runs = connection.execute(_asking("run_uuid, status, experiment_id FROM runs WHERE "), chosen).all()
        steps = Counter(connection.execute(_asking(f"m.run_uuid, step {_of('metrics')}"), chosen).all())
        params = Counter(connection.execute(_asking(f"m.run_uuid {_of('params')}"), chosen).scalars())
    engine.dispose()
    files = Path(target.artifacts)
    complete = [
        run.run_uuid
        for run in runs
        if params[run.run_uuid] == len(PARAMS)
        and (files / str(run.experiment_id) / run.run_uuid / "artifacts" / ARTIFACT).is_file()
    ]
    return {
        "arrived": len(steps),
        "repeated": steps.total() - len(steps),
        "unfinished": len(experiments) - sum(run.status == "FINISHED" for run in runs),
        "incomplete": len(experiments) - len(complete),
    }


def _of(table: str) -> str:
    return f"FROM {table} AS m JOIN runs ON runs.run_uuid = m.run_uuid WHERE "


def _asking(text: str) -> sqlalchemy.TextClause:
    query = sqlalchemy.text(f"SELECT {text} experiment_id IN :ids")
    return query.bindparams(sqlalchemy.bindparam("ids", expanding=True))


@dataclass
class Calls:
    """What a client's HTTP calls met."""

    statuses: list[int] = field(default_factory=list)
    slowest: float = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def watch(self) -> None:
        """Note every call of this process: statuses that are errors, also those that MLflow tried again after."""
        send = requests.Session.send

        def watched(session: requests.Session, request: requests.PreparedRequest, **options: object) -> object:
            started, response = time.perf_counter(), None
            try:
                response = send(session, request, **options)
                return response
            finally:
                self._note(time.perf_counter() - started, response)

        requests.Session.send = watched

    def _note(self, seconds: float, response: requests.Response | None) -> None:
        tries = response.raw.retries.history if response is not None and response.raw.retries else ()
        statuses = [each.status or 0 for each in tries]
        statuses.append(0 if response is None else response.status_code)
        with self.lock:
            self.statuses += [status for status in statuses if status == 0 or status >= 400]
            self.slowest = max(self.slowest, seconds)


def _client(job: dict, number: int, login: tuple[str, str] | None, ready: object, answer: Connection) -> None:
    """Log one run, and report it, also when it is stopped before its end."""
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # what fails is counted
    if login:
        os.environ |= {"MLFLOW_TRACKING_USERNAME": login[0], "MLFLOW_TRACKING_PASSWORD": login[1]}
    mlflow.set_tracking_uri(job["target"]["url"])
    experiment = mlflow.create_experiment(f"load-{secrets.token_hex(4)}-{number}")
    calls = Calls()
    calls.watch()
    ready.wait(LIMIT)
    started = time.time()

    def report(error: str) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        found = {"experiment": experiment, "started": started, "ended": time.time(), "error": error}
        answer.send(found | {"slowest": calls.slowest, "statuses": calls.statuses})
        os._exit(0)  # whatever its threads still wait for

    signal.signal(signal.SIGTERM, lambda signum, frame: report(STOPPED))
    try:
        _log(experiment, number < job["asynchronous"], job["pause"])
    except Exception as failure:
        report(f"{type(failure).__name__}: {failure}"[:300])
    report("")


def _log(experiment: str, asynchronous: bool, pause: float) -> None:
    synchronous = not asynchronous
    with mlflow.start_run(experiment_id=experiment):
        mlflow.log_params(PARAMS, synchronous=synchronous)
        for step in range(ALONE):
            mlflow.log_metric(METRIC, 1 / (step + 1), step=step, synchronous=synchronous)
            time.sleep(pause)
        client, run_id = mlflow.MlflowClient(), mlflow.active_run().info.run_id
        for first in range(ALONE, METRICS, BATCH):
            points = [
                mlflow.entities.Metric(METRIC, 1 / (step + 1), int(time.time() * 1000), step)
                for step in range(first, first + BATCH)
            ]
            client.log_batch(run_id, metrics=points, synchronous=synchronous)
            time.sleep(pause)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ARTIFACT
            path.write_text("what a client keeps of its run\n" * 100)
            mlflow.log_artifact(path)
        if asynchronous:
            mlflow.flush_async_logging()


def _logins(target: dict, clients: int) -> list[tuple[str, str] | None]:
    """Make an account for each client, and return names and passwords; None for each without accounts."""
    if target["admin"] is None:
        return [None] * clients
    made = [(f"load-{secrets.token_hex(4)}", secrets.token_urlsafe(12)) for _ in range(clients)]
    for name, password in made:
        body = {"username": name, "password": password}
        path = f"{target['url']}/api/2.0/mlflow/users/create"
        requests.post(path, json=body, auth=tuple(target["admin"]), timeout=60).raise_for_status()
    return made


def main(job: dict) -> list[dict]:
    """Run the clients, and return their reports."""
    fork = multiprocessing.get_context("fork")  # before there is any thread
    ready = fork.Barrier(job["clients"] + 1)
    logins = _logins(job["target"], job["clients"])
    answers, processes = [], []
    for number, login in enumerate(logins):
        mine, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=_client, args=(job, number, login, ready, theirs), daemon=True)
        process.start()
        theirs.close()
        answers.append(mine)
        processes.append(process)
    ready.wait(LIMIT)
    end = time.monotonic() + job["limit"]
    for answer, process in zip(answers, processes, strict=True):
        if not answer.poll(max(0, end - time.monotonic())):
            process.terminate()
    return [answer.recv() for answer in answers]


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
