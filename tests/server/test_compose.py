"""server/compose.yaml, read as Docker Compose would: it tells MLflow what `python -m server start` tells it.

There is no container engine in the tests, so it is compared here and not run.
"""

import re
from configparser import ConfigParser

import pytest
import yaml

from server.process import auth_config, command, environment
from server.settings import BESIDES, PREFIX, ServerSettings, read_settings
from tests.conftest import ROOT

FILE = ROOT / "server" / "compose.yaml"
ADDRESS = "postgresql://mlflow@postgres:5432/mlflow"
GIVEN = {
    f"{PREFIX}HOSTS": "mlflow.example.org",
    f"{PREFIX}ADMIN_PASSWORD": "the-administrators",
    f"{PREFIX}SECRET_KEY": "the-key-of-forms",
    f"{PREFIX}POSTGRES_PASSWORD": "the-databases",
}
SECRET = [name for name in GIVEN if not name.endswith("HOSTS")]


def compose(given):
    """Return the file with its variables filled in; a missing one that has no default is a KeyError, as it must be."""

    def fill(found):
        name, kind, rest = found["name"], found["kind"], found["rest"]
        if given.get(name):
            return given[name]
        if kind == ":-":
            return rest
        raise KeyError(f"{name}: {rest}" if kind == ":?" else name)

    def walk(node):
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        if isinstance(node, str):
            filled = re.sub(r"(?<!\$)\$\{(?P<name>\w+)(?:(?P<kind>:[-?])(?P<rest>[^}]*))?\}", fill, node)
            return filled.replace("$$", "$")
        return node

    return walk(yaml.safe_load(FILE.read_text()))


@pytest.fixture
def ours(monkeypatch, tmp_path):
    """The settings that the same variables make, but for what a container has of its own."""
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value)
    inside = {"host": "0.0.0.0", "artifacts": "/artifacts"}  # its port is published on loopback, its folder is a volume
    monkeypatch.setattr("server.settings.ENV_FILE", tmp_path / "none")
    return read_settings(profile="workshop", **inside)


def test_the_command_is_the_same(ours):
    mlflow = compose(GIVEN)["services"]["mlflow"]
    assert mlflow["command"] == command(ours)
    assert mlflow["entrypoint"][2].endswith('exec mlflow "$@"')
    assert mlflow["ports"] == [f"127.0.0.1:{ours.port}:{ours.port}"]


def test_the_environment_is_the_same(ours):
    given = compose(GIVEN)["services"]["mlflow"]["environment"]
    expected = environment(ours, ADDRESS) | {"MLFLOW_AUTH_CONFIG_PATH": "/auth.ini"}  # a config of compose
    besides = {"PGPASSWORD", "MLFLOW_S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert {name: value for name, value in given.items() if name not in besides} == expected
    assert given["PGPASSWORD"] == GIVEN[f"{PREFIX}POSTGRES_PASSWORD"]


def test_accounts_are_the_same():
    there, here = (ConfigParser(interpolation=None) for _ in range(2))
    there.read_string(compose(GIVEN)["configs"]["auth.ini"]["content"])
    here.read_string(auth_config(ADDRESS))
    assert dict(there["mlflow"]) == dict(here["mlflow"])


def test_postgres_allows_every_connection(ours):
    postgres = compose(GIVEN)["services"]["postgres"]
    assert postgres["command"][-1] == f"max_connections={ours.max_connections}"
    assert "ports" not in postgres
    assert postgres["environment"] == {
        "POSTGRES_USER": "mlflow",
        "POSTGRES_DB": "mlflow",
        "POSTGRES_PASSWORD": GIVEN[f"{PREFIX}POSTGRES_PASSWORD"],
    }


def test_the_settings_know_every_variable_of_the_file():
    known = {f"{PREFIX}{name.upper()}" for name in [*ServerSettings.model_fields, *BESIDES]}
    assert set(re.findall(rf"{PREFIX}\w+", FILE.read_text())) <= known


@pytest.mark.parametrize("missing", GIVEN)
def test_nothing_starts_without_a_secret_or_a_host(missing):
    with pytest.raises(KeyError, match=f"{missing}: set it in server/server.env"):
        compose({name: value for name, value in GIVEN.items() if name != missing})


def test_no_secret_is_on_a_command_line():
    services = compose(GIVEN)["services"]
    told = [str(service.get(key)) for service in services.values() for key in ("command", "entrypoint", "healthcheck")]
    assert not [name for name in SECRET if GIVEN[name] in "".join(told)]


def test_artifacts_go_to_the_object_store(monkeypatch):
    given = GIVEN | {f"{PREFIX}ARTIFACTS": "s3://mlflow", f"{PREFIX}S3_KEY": "the-objects"}
    services = compose(given)["services"]
    settings = ServerSettings(profile="workshop", host="0.0.0.0", artifacts="s3://mlflow", hosts="mlflow.example.org")
    assert services["mlflow"]["command"] == command(settings)
    assert services["objects"]["profiles"] == ["s3"] and "-bucket=mlflow" in services["objects"]["command"]
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    assert [services["objects"]["environment"][key] for key in keys] == ["mlflow", "the-objects"]
    assert [services["mlflow"]["environment"][key] for key in keys] == ["mlflow", "the-objects"]


def test_everything_is_watched_kept_and_started_again():
    whole = compose(GIVEN)
    volumes = [volume.partition(":")[0] for service in whole["services"].values() for volume in service["volumes"]]
    assert sorted(volumes) == sorted(whole["volumes"])
    for name, service in whole["services"].items():
        assert service["healthcheck"]["test"] and service["restart"] == "unless-stopped", name
        assert ":" in service["image"] and not service["image"].endswith(":latest"), name
    assert whole["services"]["mlflow"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert (FILE.parent / whole["configs"]["constraints.txt"]["file"]).is_file()
