"""What dies while clients log is started again and nothing is lost; what is killed leaves nothing behind."""

import os
import signal
import sys
import threading
import time

from demo_lib.ops.processes import free_port

import psutil
import pytest
import requests
import sqlalchemy

from server.database import own_postgres
from server.process import read_state, refuse, stop
from server.readiness import examine
from server.settings import ServerSettings
from tests.server.conftest import Site, make_secrets, started
from tests.tools.load import METRICS, load
from tests.tools.processes import PATIENCE, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="sends signals")]
CLIENTS, PAUSE = 10, 0.5  # a client makes 30 calls: it logs for 15 s and what the faults cost it
RESTART_SECONDS = 40  # promised are 20, which a machine that also runs other tests may need twice


@pytest.fixture
def site(tmp_path):
    """The profile `workshop` as `python -m server start` runs it."""
    site = Site(ServerSettings(profile="workshop", folder=tmp_path / "data", port=free_port(), **make_secrets()))
    with started(site.settings) as supervisor:
        yield site, supervisor


def leader(site):
    return psutil.Process(read_state(site.settings)["server"])


def answers(site):
    """Whether the server answers, from its database."""
    try:
        return requests.get(f"{site.url}/api/2.0/mlflow/experiments/get?experiment_id=0", auth=site.admin, timeout=5).ok
    except requests.RequestException:
        return False


def values(site):
    """Return how many metric values each run has in the database."""
    engine = sqlalchemy.create_engine(site.target.database)
    with engine.connect() as connection:
        found = connection.execute(sqlalchemy.text("SELECT run_uuid, count(*) FROM metrics GROUP BY run_uuid"))
        counts = dict(found.all())
    engine.dispose()
    return counts


def all_log(site, clients):
    """Wait until so many clients have logged twice from now on, or have nothing left to log."""
    before = values(site)

    def have_logged():
        now = values(site)
        return sum(now[run] >= min(before.get(run, 0) + 2, METRICS) for run in now) >= clients

    wait_until(have_logged)


def kill_a_worker(site):
    workers = [each for each in leader(site).children(recursive=True) if "spawn_main" in " ".join(each.cmdline())]
    workers[0].kill()


def kill_the_server(site):
    before = read_state(site.settings)["server"]
    os.killpg(before, signal.SIGKILL)
    wait_until(lambda: read_state(site.settings)["server"] != before, RESTART_SECONDS)


def stop_postgresql(site):
    before = own_postgres(site.settings)
    before.send_signal(signal.SIGINT)  # as `pg_ctl stop -m fast`
    wait_until(lambda: own_postgres(site.settings) not in (None, before), RESTART_SECONDS)


def test_nothing_is_lost_when_parts_die_and_nothing_is_left_when_the_supervisor_does(site):
    site, supervisor = site
    outcomes = []
    clients = threading.Thread(target=lambda: outcomes.append(load(site.target, CLIENTS, CLIENTS // 2, PAUSE)))
    clients.start()
    # The database goes first, when the workers remember everyone: MLflow refuses a login that it looks up meanwhile.
    for fault in (stop_postgresql, kill_a_worker, kill_the_server):
        all_log(site, CLIENTS - (fault is kill_the_server))  # the kill before it may have cut one off
        fault(site)
        began = time.monotonic()
        wait_until(lambda: answers(site), RESTART_SECONDS)
        print(f"{fault.__name__}: answers after {time.monotonic() - began:.1f} s")
    assert clients.is_alive(), "the clients ended before the faults: nothing is shown"
    clients.join(PATIENCE)
    outcome = outcomes[0]
    print(outcome)
    # A kill can cut an answer off after its first line: MLflow's client does not try this call again, and raises.
    cut_off = sum("Connection broken" in error for error in outcome.errors)
    assert len(outcome.errors) == cut_off <= 2, outcome
    assert outcome.repeated == 0 and max(outcome.unfinished, outcome.incomplete) <= cut_off, outcome
    assert list(values(site).values()).count(METRICS) >= CLIENTS - cut_off, outcome
    assert outcome.answers, "no client noticed: nothing is shown"
    supervisor.kill()
    supervisor.wait(PATIENCE)
    (missed,) = [each.text for each in examine(site.settings) if not each.ok]
    assert missed.startswith("nothing watches over the server any more")
    server, postgres = leader(site), own_postgres(site.settings)
    assert server.is_running() and postgres.is_running()
    assert stop(site.settings)
    assert not server.is_running() and not postgres.is_running()
    refuse(site.settings)  # nobody listens on the port
    assert not stop(site.settings)
