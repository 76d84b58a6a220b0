"""Settings: what the pages say about them is what they are."""

import re
from pathlib import Path

from demo_lib.config import ROOT

import pytest
from dotenv import dotenv_values

from server.settings import PREFIX, Flags, ServerSettings, read_settings

FIELDS = ServerSettings.model_fields
SECRET = [name for name in FIELDS if name not in Flags.model_fields]
VARIABLES = {f"{PREFIX}{name.upper()}": field for name, field in FIELDS.items()}
FILE = ROOT / "server" / "example.env"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_the_example_has_every_setting_with_its_default_and_no_secret():
    values = dotenv_values(FILE)
    assert list(values) == list(VARIABLES)
    for name, field in Flags.model_fields.items():
        assert values[f"{PREFIX}{name.upper()}"] == str(field.default if field.default_factory is None else ""), name
    assert not any(values[f"{PREFIX}{name.upper()}"] for name in SECRET)


def test_the_example_says_what_each_setting_means():
    lines = FILE.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith(PREFIX):
            assert re.match(r"# \w.{10,}", lines[number - 1]), line


def test_the_example_copied_is_the_defaults(tmp_path, monkeypatch):
    copied = tmp_path / "server.env"
    copied.write_text(FILE.read_text())
    copied.chmod(0o600)
    monkeypatch.setenv(f"{PREFIX}ENV_FILE", str(copied))
    assert read_settings().model_dump() == ServerSettings().model_dump()


def test_settings_made_in_python_are_no_other_servers(monkeypatch):
    monkeypatch.setenv(f"{PREFIX}ARTIFACTS", "/srv/artifacts")
    monkeypatch.setenv(f"{PREFIX}SECRET_KEY", "of the server that runs here")
    assert (ServerSettings().artifacts, ServerSettings().secret_key) == ("", None)
    assert read_settings().artifacts == "/srv/artifacts"


def test_the_table_of_the_page_has_every_setting_with_flag_and_default():
    rows = re.findall(r"^\| `(\w+)` \| (`(--[\w-]+)`|-) \| (.*?) \| \S.* \|$", page("## Settings"), re.MULTILINE)
    assert [row[0] for row in rows] == list(VARIABLES)
    for variable, _, flag, default in rows:
        name = variable.removeprefix(PREFIX).lower()
        assert flag == ("" if name in SECRET else f"--{name.replace('_', '-')}")
        fixed = FIELDS[name].default
        if FIELDS[name].default_factory is None and fixed not in ("", None):
            assert default == f"`{fixed}`", name


def test_every_command_of_the_page_exists():
    from server.__main__ import _parser

    commands = set(re.findall(r"python -m server (\w+)", (ROOT / "server" / "README.md").read_text()))
    known = set(_parser()._subparsers._group_actions[0].choices)
    assert commands == known


def test_the_links_of_the_page_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", (ROOT / "server" / "README.md").read_text()):
        assert Path(ROOT, "server", target).exists(), target


def page(heading):
    text = (ROOT / "server" / "README.md").read_text()
    return text.split(f"\n{heading}\n")[1].split("\n## ")[0]


def test_a_command_takes_its_own_arguments_and_the_settings(tmp_path, capsys):
    from server.__main__ import main

    assert main(["restore", str(tmp_path), "--folder", str(tmp_path / "server")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is no backup")
