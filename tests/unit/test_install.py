"""`install.py`: PyTorch from its own index where that answers, else from the usual one, and what is for whom."""

import os
import shutil
import socket
import ssl
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from demo_lib.config import ROOT

import pytest

import install as install_module
from tests.tools import wheels
from tests.tools.certificates import make_certificate
from tests.tools.packages import missing
from tests.tools.wheels import write_index

OWN, USUAL = "2.15.0+own", "2.15.0"  # PyTorch's version in its own index, and in the usual one
FILES = {
    "constraints.txt": "torch==2.15.0\n",
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    "wheels.py": Path(wheels.__file__).read_text(),
    "backend.py": """
from wheels import write_wheel
def build_editable(folder, *_):
    return write_wheel(folder, "lessons", "1", "torch", "torchvision", "ruff; extra == 'dev'")
""",
}


class PyTorchIndex(SimpleHTTPRequestHandler):
    """Has the same wheels for every GPU and for the CPU."""

    def translate_path(self, path):
        return super().translate_path("/" + path.split("/", 3)[-1])  # without /whl/cpu

    def log_message(self, *_):
        pass


class Proxy(BaseHTTPRequestHandler):
    """Leads to one port, whatever host is asked for."""

    port = None

    def do_CONNECT(self):
        self.send_response(200)
        self.end_headers()
        with socket.create_connection(("127.0.0.1", self.port)) as there:
            back = Thread(target=pump, args=(there, self.connection))
            back.start()
            pump(self.connection, there)
            back.join()

    def log_message(self, *_):
        pass


def pump(source, target):
    """Pass on what comes until one side ends."""
    try:
        while content := source.recv(65536):
            target.sendall(content)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@contextmanager
def in_thread(server):
    """Serve until the block ends, and give the port."""
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def uv():
    """The uv of this environment."""
    found = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return found or missing("uv")


def make_environment(repository, uv):
    """Make `.venv` in the repository, with uv and nothing else, and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", repository / ".venv"], check=True)
    python = repository / ".venv" / "bin" / "python"
    python.with_name("uv").symlink_to(uv)
    return python


@pytest.fixture
def install(tmp_path, uv):
    """Run `install.py` in a repository with a usual index, and return what it said and what is installed then."""
    repository = tmp_path / "a repository"
    python = make_environment(repository, uv)
    for name, content in FILES.items():
        (repository / name).write_text(content)
    shutil.copy(ROOT / "install.py", repository)
    write_index(tmp_path / "usual", torch=USUAL, torchvision=USUAL, ruff="1")
    usual = {"UV_DEFAULT_INDEX": (tmp_path / "usual").as_uri(), "UV_CACHE_DIR": str(tmp_path / "cache")}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UV_") and name != "NO_PROXY"}

    def call(*options, **environment):
        done = subprocess.run(
            [sys.executable, repository / "install.py", *options],
            env=clean | usual | environment,
            capture_output=True,
            text=True,
        )
        installed = {}
        for name in ("torch", "torchvision", "ruff"):
            asked = subprocess.run([python, "-c", f"import {name}; print({name}.version)"], capture_output=True)
            installed[name] = asked.stdout.decode().strip() or None
        marks = {path.name for path in (repository / ".venv").glob(".installed*")}
        return done, installed, marks

    return call


@pytest.fixture
def own_index(tmp_path):
    """Let PyTorch's host lead to an index on this machine, and give the variables that make clients go there."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make_certificate("download.pytorch.org", certificate, key)
    write_index(tmp_path / "own", torch=OWN, torchvision=OWN)
    index = ThreadingHTTPServer(("127.0.0.1", 0), partial(PyTorchIndex, directory=tmp_path / "own"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    index.socket = context.wrap_socket(index.socket, server_side=True)
    with ExitStack() as stack:
        handler = type("ToTheIndex", (Proxy,), {"port": stack.enter_context(in_thread(index))})
        port = stack.enter_context(in_thread(ThreadingHTTPServer(("127.0.0.1", 0), handler)))
        yield {"HTTPS_PROXY": f"http://127.0.0.1:{port}", "SSL_CERT_FILE": str(certificate)}


def test_pytorchs_own_index_is_taken_where_it_answers_and_a_learner_gets_no_developers_tools(install, own_index):
    done, installed, marks = install(**own_index)
    assert done.returncode == 0 and not done.stdout, done.stderr
    assert installed == {"torch": OWN, "torchvision": OWN, "ruff": None}
    assert marks == {".installed"}
    _, installed, marks = install("--dev", **own_index)
    assert installed == {"torch": OWN, "torchvision": OWN, "ruff": "1"}
    assert marks == {".installed", ".installed-dev"}


@pytest.mark.parametrize("network", ["refused", "silent"])
def test_where_pytorchs_index_cannot_be_reached_the_usual_one_is_taken_and_one_line_says_so(install, network):
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections and never answers
        port = listener.getsockname()[1] if network == "silent" else 1
        done, installed, _ = install(HTTPS_PROXY=f"http://127.0.0.1:{port}")
    assert done.returncode == 0, done.stderr
    assert installed == {"torch": USUAL, "torchvision": USUAL, "ruff": None}
    assert len(done.stdout.splitlines()) == 1 and "(download.pytorch.org) can't be used here" in done.stdout


def test_a_backend_of_the_users_choice_is_left_alone(install):
    done, installed, marks = install(UV_TORCH_BACKEND="cpu", HTTPS_PROXY="http://127.0.0.1:1", UV_HTTP_RETRIES="0")
    assert done.returncode != 0 and "download.pytorch.org" in done.stderr and not done.stdout
    assert not marks and not installed["torch"]


BREAKS = {
    "nothing": lambda python: None,
    "no uv": lambda python: python.with_name("uv").unlink(),
    "half a uv": lambda python: replace(python.with_name("uv"), b"half"),
    "no environment": lambda python: (python.parents[1] / "pyvenv.cfg").unlink(),
    "no Python": lambda python: (python.unlink(), python.symlink_to("/nowhere/python3")),
    "another Python": lambda python: replace(python, b"#!/bin/sh\nexit 1\n"),
}


def replace(path, content):
    path.unlink()
    path.write_bytes(content)
    path.chmod(0o755)


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_environment_is_known_as_one(tmp_path, uv, monkeypatch, broken):
    python = make_environment(tmp_path, uv)
    BREAKS[broken](python)
    monkeypatch.setattr(install_module, "PYTHON", python)
    monkeypatch.setattr(install_module, "UV", python.with_name("uv"))
    assert install_module.is_usable() == (broken == "nothing")


def test_another_python_is_refused_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(SystemExit, match=r"doesn't do: use 3\.11 to 3\.14"):
        install_module.main()
