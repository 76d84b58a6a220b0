"""What `start` refuses, in one sentence; what it passes on to MLflow; and that `stop` leaves nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path
from unittest.mock import Mock

from demo_lib.config import DemoError, sqlite_uri
from demo_lib.identity import identity
from demo_lib.ops.processes import free_port

import mlflow
import psutil
import pytest
import requests
import sqlalchemy
from pydantic import SecretStr

from server.__main__ import main
from server.backup import back_up
from server.client import as_admin
from server.database import check_database, database, database_address, forget_other_process, postgres_tool
from server.process import STATE, Server, auth_config, environment, read_state, refuse, running, stop
from server.settings import PREFIX, ServerSettings, read_settings
from tests.server.conftest import make_secrets
from tests.tools.processes import PATIENCE, normal_signals, wait_until

pytestmark = pytest.mark.xdist_group("server")


def settings(folder, **values):
    return ServerSettings(**{"folder": folder, "port": free_port()} | values)


def command(folder, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "server", *arguments],
        env=os.environ | {f"{PREFIX}FOLDER": str(folder)} | environment,
        preexec_fn=normal_signals,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", ["admin_password", "secret_key"])
@pytest.mark.parametrize("text", [None, "short", "Königsberg-1234", " " * 12])
def test_a_workshop_needs_good_secrets(tmp_path, name, text):
    given = make_secrets(**{name: text and SecretStr(text)})
    with pytest.raises(DemoError, match=f"{name.upper()} must be 12 or more ASCII letters, digits and signs"):
        refuse(settings(tmp_path, profile="workshop", **given))


def test_others_are_not_let_in_without_accounts(tmp_path):
    with pytest.raises(DemoError, match="lets others in without accounts"):
        refuse(settings(tmp_path, host="0.0.0.0"))
    refuse(settings(tmp_path, host="0.0.0.0", profile="workshop", **make_secrets()))


def test_a_port_in_use_is_refused(tmp_path, local):
    with pytest.raises(DemoError, match=r"can't be listened on .*: choose another --port"):
        refuse(settings(tmp_path, port=local.settings.port))


def test_a_second_server_in_the_folder_is_refused(local):
    with pytest.raises(DemoError, match="already runs in"):
        refuse(settings(local.settings.folder))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"artifacts": "{folder}/none"}, "/none does not exist"),
        ({"artifacts": "/proc/sys"}, "a folder can't be used .*'/proc/sys/"),
        ({"folder": "/proc/x"}, "a folder can't be used .*'/proc/x'"),
    ],
)
def test_a_folder_must_be_there_and_be_writable(tmp_path, given, sentence):
    with pytest.raises(DemoError, match=sentence):
        refuse(
            settings(**{"folder": tmp_path} | {name: value.format(folder=tmp_path) for name, value in given.items()})
        )
    assert list(tmp_path.iterdir()) == []
    refuse(settings(tmp_path, artifacts="s3://bucket/files"))


def test_postgresql_is_not_started_where_it_can_not_be_and_says_so(tmp_path):
    for name in ("with space", "a'b", 'a"b', "a;b", "a$5"):
        with (
            pytest.raises(DemoError, match=r"PostgreSQL can't be in .*: choose a --folder without spaces, quotes"),
            database(settings(tmp_path / name, profile="workshop", **make_secrets())),
        ):
            raise AssertionError("it runs")
    (tmp_path / "half" / "postgres").mkdir(parents=True)
    (tmp_path / "half" / "postgres" / "postmaster.pid").write_text("-1")
    with (
        pytest.raises(DemoError, match=r"can't be started in .*: delete that folder, and start again\.$"),
        database(settings(tmp_path / "half", profile="workshop", **make_secrets())),
    ):
        raise AssertionError("it runs")


def test_a_cluster_of_another_postgresql_gives_its_reason_and_no_advice_to_delete(tmp_path):
    (chosen := tmp_path / "server" / "postgres").mkdir(parents=True)
    given = settings(tmp_path / "server", profile="workshop", **make_secrets())
    chosen.rmdir()
    with database(given):
        pass
    (chosen / "PG_VERSION").write_text("15\n")
    reason = (
        r"FATAL: +database files are incompatible with server\): correct that, and see its file log, and start again"
    )
    with pytest.raises(DemoError, match=reason), database(given):
        raise AssertionError("it runs")


def test_a_locale_that_is_not_here_does_not_keep_postgresql_from_starting(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "xx_XX.UTF-8")
    with database(settings(tmp_path / "server", profile="workshop", **make_secrets())) as (address, _):
        assert check_database(address, settings(tmp_path)) is False


@pytest.mark.skipif(os.name != "posix", reason="Windows has other owners")
def test_another_users_cluster_is_left_to_that_user(tmp_path, monkeypatch):
    (tmp_path / "server" / "postgres").mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    given = settings(tmp_path / "server", profile="workshop", **make_secrets())
    with pytest.raises(DemoError, match=r"postgres belongs to .*: start the server as that user"), database(given):
        raise AssertionError("it runs")


def test_what_a_dead_postgresql_left_is_removed_only_if_another_program_has_its_number(tmp_path):
    (tmp_path / "postgres").mkdir()
    file = tmp_path / "postgres" / "postmaster.pid"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    file.write_text(f"{dead.pid}\n{tmp_path}\n")
    forget_other_process(settings(tmp_path))
    assert file.exists()  # PostgreSQL itself looks for its orphans by it
    file.write_text(f"{os.getpid()}\n{tmp_path}\n")
    forget_other_process(settings(tmp_path))
    assert not file.exists()


def test_a_first_start_that_is_cut_off_leaves_a_whole_database(tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "start", Mock(side_effect=KeyboardInterrupt))
    given = settings(tmp_path / "server")
    with pytest.raises(KeyboardInterrupt), running(given):
        raise AssertionError("it runs")
    assert check_database(given.address, given)
    with sqlalchemy.create_engine(given.address).connect() as connection:
        assert connection.scalar(sqlalchemy.text("SELECT artifact_location FROM experiments")) == "mlflow-artifacts:/0"


def test_a_copied_folder_is_no_server(local, tmp_path):
    shutil.copy(local.settings.folder / STATE, tmp_path / STATE)
    copied = settings(tmp_path)
    assert read_state(copied) is None and not stop(copied)
    assert read_state(local.settings)["supervised"]


def test_another_users_server_is_said_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=PermissionError))
    for ask in (read_state, database_address):
        with pytest.raises(DemoError, match="is another user's: work on it as that user"):
            ask(settings(tmp_path, profile="workshop"))


@pytest.mark.parametrize("hosts", ["https://mlflow.example.org/", "a.example,http://b.example", "a/b"])
def test_hosts_are_names_and_no_addresses(monkeypatch, hosts):
    with pytest.raises(DemoError, match=r"which is no name: write mlflow\.example\.org, without https://"):
        read_settings(hosts=hosts)
    assert read_settings(hosts="a.example, b.example:8443").hosts


def test_another_postgresql_of_the_shell_is_kept_out_of_the_servers_own(tmp_path, monkeypatch):
    monkeypatch.setenv("PGSERVICE", "elsewhere")
    assert main(["stop", "--profile", "workshop", "--folder", str(tmp_path)]) == 0
    assert "PGSERVICE" not in os.environ
    monkeypatch.setenv("PGSSLMODE", "require")
    monkeypatch.setenv(f"{PREFIX}DATABASE", "postgresql://me:secret@db.example/mlflow")
    assert main(["stop", "--folder", str(tmp_path)]) == 0
    assert os.environ["PGSSLMODE"] == "require"


def test_a_folder_from_a_file_may_name_a_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("$HOME/data", "~/data"):
        assert read_settings(folder=text).folder == tmp_path / "data"


@pytest.mark.parametrize(
    ("profile", "name"),
    [("local", """it's "the 東京 #1;$HOME"""), pytest.param("workshop", "really?ü#", marks=pytest.mark.slow)],
)
def test_a_folder_with_any_other_sign_works(profile, name):
    with tempfile.TemporaryDirectory(prefix=name) as folder:  # a short path, in which PostgreSQL has its socket
        given = settings(Path(folder), profile=profile, **make_secrets())
        with running(given), as_admin(given):
            with mlflow.start_run(experiment_id="0") as run:
                mlflow.log_text(name, "text.txt")
            assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/text.txt") == name
            assert back_up(given, Path(folder, "backup"))["counts"]["runs"] == 1
        assert [path.read_text() for path in Path(folder, "artifacts").rglob("text.txt")] == [name]


def test_what_is_kept_elsewhere_than_the_path_says_is_refused(tmp_path):
    with pytest.raises(DemoError, match=r"leave \? and % out"), running(settings(tmp_path / "really?")):
        raise AssertionError("it runs")
    for given in ({"folder": tmp_path / "50%20"}, {"folder": tmp_path, "artifacts": str(tmp_path / "50%20")}):
        with pytest.raises(DemoError, match=r"can't keep artifacts in .*50%20.*: choose a folder without %"):
            refuse(settings(**given, profile="workshop", **make_secrets()))
    refuse(settings(tmp_path, artifacts="s3://bucket/50%20"))


def test_two_starts_at_once_do_not_meet(tmp_path):
    given = settings(tmp_path)
    with (
        database(given),
        pytest.raises(DemoError, match="another `python -m server` works in"),
        database(given),
    ):
        raise AssertionError("both start")
    with database(given) as (address, _):
        assert address.startswith("sqlite")


def test_mlflow_reads_the_address_that_it_was_given(tmp_path):
    address = "postgresql://me:100%25%40home@db.example/mlflow?host=%C3%9Cbung"
    (config := ConfigParser()).read_string(auth_config(address))
    assert config["mlflow"]["database_uri"] == address
    assert ServerSettings(database=SecretStr(address)).hidden == [address]


@pytest.mark.parametrize(
    "address",
    [
        "postgres://u:hidden@host/x", "foo", "mysql://u:hidden@127.0.0.1/x", "http://127.0.0.1:5601",
        "postgresql://u:hidden@127.0.0.1:port/x", " postgresql://u:hidden@host/x",
        "postgresql://u:hid@den/p#w@127.0.0.1:1/x",
    ],
)  # fmt: skip
def test_no_address_is_one_sentence_that_shows_nothing_of_it(monkeypatch, address):
    monkeypatch.setenv(f"{PREFIX}DATABASE", address)
    with pytest.raises(DemoError, match=r"DATABASE is no address of a database: write postgresql://NAME") as caught:
        read_settings()
    assert "den" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["postgresql://me:very-secret@127.0.0.1:{port}/mlflow", "sqlite:///{folder}/notes.txt"]
)
def test_a_database_that_cannot_be_reached_is_refused_without_its_password(tmp_path, address):
    (tmp_path / "notes.txt").write_text("not a database, but a longer text than its first bytes" * 20)
    address = address.format(port=free_port(), folder=tmp_path)
    with pytest.raises(DemoError, match="can't be used") as caught:
        check_database(address, settings(tmp_path))
    assert "very-secret" not in str(caught.value)


def test_a_database_of_another_mlflow_is_refused_and_the_upgrade_named(tmp_path):
    address = sqlite_uri(tmp_path / "mlflow.db")
    with sqlalchemy.create_engine(address).begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE experiments (name VARCHAR(32))"))
        connection.execute(sqlalchemy.text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(sqlalchemy.text("INSERT INTO alembic_version VALUES ('451aebb31d03')"))
    with pytest.raises(DemoError, match=r"version 451aebb31d03.*`mlflow db upgrade`"):
        check_database(address, settings(tmp_path))


def test_a_postgresql_with_too_few_connections_is_refused(workshop):
    many = ServerSettings(**workshop.settings.model_dump() | {"workers": 10})
    with pytest.raises(DemoError, match="allows 420 connections and the server may open 2020"):
        check_database(database_address(workshop.settings), many)


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path, monkeypatch):
    file = tmp_path / "server.env"
    file.write_text(f"{PREFIX}PORT=6001\n{PREFIX}WORKERS=3\n{PREFIX}HOSTS=a.example\n{PREFIX}SECRET_KEY=from the file")
    file.chmod(0o600)
    monkeypatch.setenv(f"{PREFIX}ENV_FILE", str(file))
    monkeypatch.setenv(f"{PREFIX}WORKERS", "4")
    monkeypatch.setenv(f"{PREFIX}HOSTS", "b.example")
    found = read_settings(hosts="c.example")
    assert (found.port, found.workers, found.hosts) == (6001, 4, "c.example")
    assert found.secret_key.get_secret_value() == "from the file" and "from the file" not in repr(found)


def test_a_file_that_others_can_read_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "server.env"
    file.touch(0o644)
    monkeypatch.setenv(f"{PREFIX}ENV_FILE", str(file))
    with pytest.raises(DemoError, match=r"others can read .*chmod 600"):
        read_settings()
    monkeypatch.setenv(f"{PREFIX}ENV_FILE", str(tmp_path / "none"))
    with pytest.raises(DemoError, match="is no file"):
        read_settings()


def test_what_can_not_be_read_in_the_file_is_said(tmp_path, monkeypatch):
    (file := tmp_path / "server.env").touch(0o600)
    monkeypatch.setenv(f"{PREFIX}ENV_FILE", str(file))
    good = f"\ufeff# mine\n{PREFIX}PORT=6001\n\n{PREFIX}FOLDER=~/data\n"
    file.write_text(f"{good}export AWS_REGION='x'\nMLFLOW_S3_ENDPOINT_URL=\n{PREFIX}POSTGRES_PASSWORD=y\n")
    assert (read_settings().port, read_settings().folder) == (6001, Path.home() / "data")
    for line in (f"{PREFIX}PROFILE: workshop", f"{PREFIX}PROFILE", f"{PREFIX}SECRET_KEY='x"):
        file.write_text(f"{good}\n{line}\n")
        with pytest.raises(DemoError, match=r"^line 6 of .*server\.env can't be read: write NAME=value\.$"):
            read_settings()
    file.write_bytes(f"{PREFIX}ADMIN_PASSWORD=König".encode("latin-1"))
    with pytest.raises(DemoError, match="save it as UTF-8"):
        read_settings()


@pytest.mark.parametrize("name", [f"{PREFIX}PROFIL", "MLFLOW_DEMO_PROFILE", f"{PREFIX}ARTIFACT".lower()])
def test_a_mistyped_name_is_no_setting(tmp_path, monkeypatch, name):
    (file := tmp_path / "server.env").touch(0o600)
    file.write_text(f"{name}=workshop\n")
    monkeypatch.setenv(f"{PREFIX}ENV_FILE", str(file))
    with pytest.raises(DemoError, match=rf"^{name} in .*server\.env is no setting"):
        read_settings()
    file.write_text("")
    monkeypatch.setenv(name, "workshop")
    with pytest.raises(DemoError, match=f"^{name} in the environment is no setting"):
        read_settings()


HOSTS = ["::1", "[::1]", "fe80::1%eth0", "http://127.0.0.1", "127.0.0.1:5080", "", " ", "-h", "a..b"]


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_is_a_name_or_an_ipv4_address(host):
    with pytest.raises(DemoError, match=r"^MLFLOW_DEMO_SERVER_HOST = .* is no IPv4 address and no name: write 127"):
        read_settings(host=host)


def test_a_bad_value_is_one_sentence(monkeypatch):
    monkeypatch.setenv(f"{PREFIX}PORT", "70000")
    with pytest.raises(DemoError, match=r"MLFLOW_DEMO_SERVER_PORT = '70000' is not allowed: it should be"):
        read_settings()


def test_no_flag_takes_a_secret():
    done = subprocess.run([sys.executable, "-m", "server", "start", "--help"], capture_output=True, text=True)
    assert "--max-overflow" in done.stdout and not re.search("--(database|admin-password|secret-key)", done.stdout)


def tree(leader):
    return [psutil.Process(leader), *psutil.Process(leader).children(recursive=True)]


def test_a_server_that_ends_at_once_names_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr("server.process.command", lambda settings: ["server", "--no-such-option"])
    with (
        pytest.raises(DemoError, match=r"ended before it answered: look into .*server\.log"),
        running(settings(tmp_path)),
    ):
        raise AssertionError("it runs")
    assert "no-such-option" in (tmp_path / "server.log").read_text()
    assert read_state(settings(tmp_path)) is None


def test_a_server_that_dies_at_once_is_started_after_longer_and_longer_pauses(tmp_path, monkeypatch, capsys):
    lived, pauses = [1, 1, 1, 59, 1, 1, 1, 61, 2], []
    times = iter([time for seconds in lived for time in (0, seconds)] + [0])

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == len(lived):
            raise KeyboardInterrupt

    monkeypatch.setattr("server.process.sys.executable", shutil.which("false"))
    monkeypatch.setattr("server.process.monotonic", lambda: next(times))
    monkeypatch.setattr("server.process.sleep", pause)
    server = Server(settings(tmp_path), sqlite_uri(tmp_path / "mlflow.db"), None)
    server.start()
    with pytest.raises(KeyboardInterrupt):
        server.supervise()
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 1, 2]
    said = f"the server ended (1; log: {tmp_path / 'server.log'}): starting it again in 16 s."
    assert capsys.readouterr().out.splitlines()[4] == said


def test_a_server_gets_no_variable_of_mlflow_but_its_own_and_those_of_the_provider(tmp_path, monkeypatch):
    for name in ("MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE", "_MLFLOW_SERVER_ARTIFACT_ROOT", f"{PREFIX}SECRET_KEY"):
        monkeypatch.setenv(name, "of the shell")
    for name in ("AWS_REGION", "MLFLOW_S3_ENDPOINT_URL", "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE"):
        monkeypatch.setenv(name, "of the provider")
    monkeypatch.setattr("server.process.command", lambda settings: ["gc", "--help"])
    server = Server(given := settings(tmp_path), sqlite_uri(tmp_path / "mlflow.db"), None)
    server.start()
    found = server.process.environ()
    server.process.wait(PATIENCE)
    named = {name: value for name, value in found.items() if "MLFLOW_" in name and value != "of the provider"}
    ours = {name: value for name, value in environment(given, server.address).items() if "MLFLOW_" in name}
    assert named == ours and "of the shell" not in found.values()
    assert list(found.values()).count("of the provider") == 3


def test_what_a_server_writes_is_its_owners_only(tmp_path):
    (tmp_path / "artifacts").mkdir(0o755)
    (tmp_path / "artifacts").chmod(0o755)
    (tmp_path / "mlflow.db").touch(0o644)  # both as an earlier version left them
    with running(given := settings(tmp_path)), as_admin(given), mlflow.start_run(experiment_id="0"):
        mlflow.log_text("mine", "notes/text.txt")
    written = [each for each in tmp_path.rglob("*") if each.name != "lock"]
    assert {"text.txt", "mlflow.db", "server.log"} <= {each.name for each in written}
    assert [each for each in written if each.stat().st_mode & 0o077] == []
    (named := tmp_path / "named").mkdir(0o755)
    refuse(settings(tmp_path / "new", artifacts=str(named)))
    assert named.stat().st_mode & 0o777 == (tmp_path / "new").stat().st_mode & 0o777 == 0o755


def test_the_log_has_no_warning_for_programmers(workshop):
    log = (workshop.settings.folder / "server.log").read_text()
    assert "Security middleware enabled" in log and "DeprecationWarning" not in log


def test_stop_says_that_nothing_runs(tmp_path):
    process = command(tmp_path, "stop")
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, "") and "no server runs" in output


OTHER_ENDS = ("SIGHUP", "stop", "stop after the supervisor was killed")


@pytest.mark.parametrize("end", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_every_way_to_end_a_command_is_the_same_exception(end):
    code = f"""
import signal
from server.process import ends_interrupt
ends_interrupt()
try:
    signal.raise_signal(signal.{end})
except KeyboardInterrupt:
    signal.raise_signal(signal.{end})  # a second one changes nothing
    print("closed")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=normal_signals)
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr


@pytest.mark.parametrize("end", ["SIGTERM", *(pytest.param(end, marks=pytest.mark.slow) for end in OTHER_ENDS)])
def test_nothing_is_left_of_a_server_that_was_ended(tmp_path, end):
    port = free_port()
    given = {f"{PREFIX}PORT": str(port), f"{PREFIX}PROFILE": "workshop"}
    given |= {f"{PREFIX}{name.upper()}": value.get_secret_value() for name, value in make_secrets().items()}
    server = command(tmp_path, "start", **given)
    said = [server.stdout.readline() for _ in range(3)]
    assert [line.split(" (")[0] for line in said[:2]] == ["starting PostgreSQL", "starting MLflow"]
    assert "server on" in said[2], server.communicate(timeout=PATIENCE)
    processes = tree(server.pid)
    postgres = int((tmp_path / "postgres" / "postmaster.pid").read_text().splitlines()[0])
    assert requests.get(f"http://127.0.0.1:{port}/health", timeout=10).ok and len(processes) >= 4
    if end.startswith("SIG"):
        server.send_signal(signal.Signals[end])
    else:
        if "killed" in end:
            server.kill()
        done = command(tmp_path, "stop", **given)
        assert done.communicate(timeout=PATIENCE)[0] == "stopped.\n"
    server.communicate(timeout=PATIENCE)
    assert server.returncode == (-signal.SIGKILL if "killed" in end else 0)
    wait_until(lambda: not psutil.pid_exists(postgres) or psutil.Process(postgres).status() == "zombie")
    assert not [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert Path(postgres_tool("pg_ctl")).is_file() and not (tmp_path / "server.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at process groups, and what a clock does to them")
def test_stop_leaves_a_later_process_of_the_old_number_alone(tmp_path):
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as later:
        here = identity(os.getpid()).rsplit(":", 1)[0]
        state = {"supervisor": f"{here}:1", "server": later.pid, "mark": "of a server that is gone"}
        (tmp_path / STATE).write_text(json.dumps(state))
        assert not stop(settings(tmp_path))
        assert later.poll() is None
        later.kill()


def test_a_running_server_is_known_whatever_the_clock_says(local, monkeypatch):
    real = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 3600)
    assert read_state(local.settings)["supervised"]
    with pytest.raises(DemoError, match="a server already runs in"):
        refuse(local.settings)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"supervisor": [1, 2], "server": [1, 2]}'])
def test_a_state_that_another_version_wrote_is_no_server(tmp_path, text):
    (tmp_path / STATE).write_text(text)
    assert read_state(settings(tmp_path)) is None
