"""The environment files agree with each other, and the repository holds nothing that it must not."""

import re
import subprocess
import tomllib

from demo_lib.config import ROOT

import pytest
import yaml
from packaging.requirements import Requirement

import install

CONDA_NAMES = {"pytorch-cpu": "torch"}


def ranges(lines):
    requirements = [Requirement(line) for line in lines]
    return {CONDA_NAMES.get(each.name, each.name): each.specifier for each in requirements}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yml_has_the_packages_and_ranges_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert environment["channels"][0] == "conda-forge"
    assert pip["pip"][-1] == "-e ."
    found = ranges([line for line in conda if line != "pip"] + pip["pip"][:-1])
    assert found.pop("python") == Requirement(f"python{project()['requires-python']}").specifier
    extras = project()["optional-dependencies"]
    assert found.pop("nbval") == ranges(extras["dev"])["nbval"]
    assert found == ranges(project()["dependencies"] + extras["dask"])


def test_the_pins_satisfy_the_ranges_and_have_no_address():
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text and "--" not in text
    pins = {}
    for line in text.splitlines():
        name, _, version = line.split(";")[0].strip().partition("==")
        pins.setdefault(name, set()).add(version)
    for name, specifier in ranges(project()["dependencies"] + project()["optional-dependencies"]["dev"]).items():
        assert pins[name] and all(specifier.contains(version) for version in pins[name]), name


def test_install_takes_the_pythons_of_pyproject():
    allowed = Requirement(f"python{project()['requires-python']}").specifier
    minors = [minor for minor in range(30) if allowed.contains(f"3.{minor}")]
    assert ((3, minors[0]), (3, minors[-1])) == (install.OLDEST, install.NEWEST)


def tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not in a git repository")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_is_over_5_mb_and_none_names_a_registry_or_a_lock():
    for path in tracked():
        assert path.stat().st_size < 5_000_000, path
        assert path.name not in ("uv.lock", "pylock.toml"), path
        if path.suffix not in (".gz", ".png"):
            assert not re.search(r"files\.pythonhosted\.org|pypi\.org/simpl[e]", path.read_text()), path
