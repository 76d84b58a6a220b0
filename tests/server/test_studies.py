"""A database for Optuna's workers in the workshop's PostgreSQL: open to them only, and again after a death."""

import os
import signal

from demo_lib.config import DemoError, without_login
from demo_lib.ops.processes import free_port

import optuna
import psycopg
import pytest
from pydantic import SecretStr

from server.database import own_postgres
from server.process import refuse, running
from server.readiness import examine
from server.settings import ServerSettings
from server.studies import studies_address
from tests.server.conftest import make_secrets, started
from tests.tools.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("server")]
PASSWORD = "it's a %40 w:rd/@x"


def settings_in(folder, **given):
    chosen = {"profile": "workshop", "folder": folder, "port": free_port()}
    chosen |= {"studies": True, "studies_port": free_port(), "studies_password": SecretStr(PASSWORD)}
    return ServerSettings(**make_secrets(**chosen | given))


def finding(settings):
    return next(each for each in examine(settings) if each.name == "studies")


def is_refused(port, user, database, password):
    try:
        psycopg.connect(
            host="127.0.0.1", port=port, user=user, dbname=database, password=password, connect_timeout=9
        ).close()
    except psycopg.OperationalError:
        return True
    return False


def test_workers_get_in_nobody_else_does_and_a_killed_postgresql_lets_them_in_again(tmp_path):
    settings = settings_in(tmp_path)
    with started(settings):
        address = studies_address(settings)
        optuna.create_study(storage=address, study_name="x").optimize(lambda trial: 1.0, n_trials=2)
        found = finding(settings)
        assert found.ok and without_login(address) in found.text and PASSWORD not in found.text
        port = settings.studies_port
        assert not is_refused(port, "optuna", "optuna", PASSWORD)
        for user in ("optuna", "postgres", "embedded_postgres"):
            for database in ("optuna", "mlflow", "postgres", "template1"):
                for password in ("", "wrong", PASSWORD):
                    right = (user, database, password) == ("optuna", "optuna", PASSWORD)
                    assert right or is_refused(port, user, database, password), (user, database)
        killed = own_postgres(settings)
        os.kill(killed.pid, signal.SIGKILL)
        wait_until(lambda: own_postgres(settings) not in (None, killed) and finding(settings).ok)
        assert len(optuna.load_study(storage=address, study_name="x").trials) == 2
    with running(settings.model_copy(update={"studies": False})):
        assert is_refused(port, "optuna", "optuna", PASSWORD)
    changed = settings.model_copy(update={"studies_password": SecretStr("another one")})
    with running(changed):
        assert is_refused(port, "optuna", "optuna", PASSWORD)
        assert len(optuna.load_study(storage=studies_address(changed), study_name="x").trials) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"studies_password": None}, "MLFLOW_DEMO_SERVER_STUDIES_PASSWORD is not set"),
        ({"profile": "local"}, "--studies is a database of the workshop's own PostgreSQL"),
        ({"database": SecretStr("postgresql://a:b@localhost/c")}, "--studies is a database of the workshop's own"),
    ],
)
def test_what_can_not_be_is_said_before_anything_starts(given, message, tmp_path):
    with pytest.raises(DemoError, match=message):
        refuse(settings_in(tmp_path / "none", **given))
    assert not (tmp_path / "none").exists()
