"""The example server/nginx.conf, with names, paths and ports of the test: a real nginx before the workshop profile."""

import getpass
import http.client
import os
import ssl
import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from demo_lib.ops.processes import free_port

import mlflow
import pytest
import requests

from tests.conftest import ROOT
from tests.tools.certificates import make_certificate
from tests.tools.packages import find_program
from tests.tools.processes import serving

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("server")]

NAME = "localhost"  # which the workshop profile answers to


@dataclass
class Proxy:
    """nginx, with the port of plain HTTP, that of TLS, and the certificate that its clients trust."""

    plain: int
    tls: int
    certificate: Path

    @property
    def url(self):
        return f"https://{NAME}:{self.tls}"


@pytest.fixture(scope="module")
def proxy(workshop, tmp_path_factory):
    nginx = find_program("nginx-light", "nginx")
    folder = tmp_path_factory.mktemp("nginx")
    make_certificate(NAME, folder / "mlflow.pem", folder / "mlflow.key")
    proxy = Proxy(free_port(), free_port(), folder / "mlflow.pem")
    main = folder / "nginx.conf"
    main.write_text(whole(folder, render(folder, proxy, workshop.settings.port), ready := free_port()))
    command = [nginx, "-p", str(folder), "-c", str(main), "-e", str(folder / "error.log")]
    subprocess.run([*command, "-t"], check=True, capture_output=True)
    with serving([*command, "-g", "daemon off;"], f"http://127.0.0.1:{ready}"):
        yield proxy


def render(folder, proxy, port):
    """Return the shipped file with nothing but names, paths and ports replaced; each must be in it."""
    text = (ROOT / "server" / "nginx.conf").read_text()
    for shipped, here in {
        "mlflow.example.org": NAME,
        "/etc/ssl/certs/mlflow.pem": str(folder / "mlflow.pem"),
        "/etc/ssl/private/mlflow.key": str(folder / "mlflow.key"),
        "127.0.0.1:5080;": f"127.0.0.1:{port};",
        "listen 80;": f"listen 127.0.0.1:{proxy.plain};",
        "listen 443 ssl;": f"listen 127.0.0.1:{proxy.tls} ssl;",
    }.items():
        assert shipped in text
        text = text.replace(shipped, here)
    return text


def whole(folder, text, ready):
    """Return a configuration that has the text where the distribution includes conf.d, and a port that says ready."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder / kind};\n" for kind in kinds)
    text += f"server {{ listen 127.0.0.1:{ready}; return 204; }}\n"
    main = f"user {getpass.getuser()};\npid {folder / 'nginx.pid'};\nevents {{}}\n"
    return f"{main}http {{\naccess_log off;\n{temporary}{text}}}\n"


@pytest.fixture(scope="module")
def account(workshop):
    """A participant's name and password."""
    login = (f"nina-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex)
    call = {"json": dict(zip(("username", "password"), login, strict=True)), "auth": workshop.admin}
    assert requests.post(f"{workshop.url}/api/2.0/mlflow/users/create", **call).status_code == 200
    return login


def statuses(proxy, path, logins, threads=16):
    """Return how often each status came back: one call each, all at once."""

    def call(login):
        return requests.get(proxy.url + path, auth=login, verify=proxy.certificate, timeout=60).status_code

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(call, logins))
    return {status: found.count(status) for status in set(found)}


def test_the_client_works_through_it(proxy, account, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(proxy.certificate))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", account[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", account[1])
    mlflow.set_tracking_uri(proxy.url)
    experiment = mlflow.create_experiment(f"through-{account[0]}")
    big = tmp_path / "big.bin"
    big.write_bytes(os.urandom(20 << 20))
    with mlflow.start_run(experiment_id=experiment) as run:
        mlflow.log_metrics({"loss": 0.5})
        mlflow.log_artifact(big)
    assert mlflow.get_run(run.info.run_id).data.metrics == {"loss": 0.5}
    back = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="big.bin", dst_path=tmp_path / "b")
    assert Path(back).read_bytes() == big.read_bytes()


def test_plain_http_is_sent_to_tls(proxy):
    answer = requests.post(f"http://{NAME}:{proxy.plain}/api/x?y=1", allow_redirects=False)
    assert (answer.status_code, answer.headers["Location"]) == (308, f"https://{NAME}/api/x?y=1")


def test_health_is_open_and_the_rest_is_not(proxy):
    assert requests.get(f"{proxy.url}/health", verify=proxy.certificate).text == "OK"
    answer = requests.get(f"{proxy.url}/", verify=proxy.certificate)
    assert answer.status_code == 401 and answer.headers["Strict-Transport-Security"]


@pytest.mark.parametrize(("version", "works"), [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)])
def test_old_tls_is_refused(proxy, version, works):
    context = ssl.create_default_context(cafile=proxy.certificate)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    connection = http.client.HTTPSConnection(NAME, proxy.tls, context=context)
    if works:
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
    else:
        with pytest.raises(ssl.SSLError):
            connection.request("GET", "/health")


@pytest.mark.parametrize(
    ("path", "size", "status"),
    [
        ("/api/2.0/mlflow/runs/log-batch", (16 << 20) + 1, 413),
        ("/api/2.0/mlflow-artifacts/artifacts/1/x/artifacts/y", (512 << 20) + 1, 413),
        ("/api/2.0/mlflow-artifacts/artifacts/1/x/artifacts/y", (16 << 20) + 1, 401),
    ],
)
def test_a_body_over_the_limit_is_refused_before_it_is_sent(proxy, path, size, status):
    context = ssl.create_default_context(cafile=proxy.certificate)
    connection = http.client.HTTPSConnection(NAME, proxy.tls, context=context, timeout=20)
    connection.putrequest("PUT" if "artifacts" in path else "POST", path)
    connection.putheader("Content-Length", str(size))
    connection.endheaders()
    assert connection.getresponse().status == status
    connection.close()


def test_quick_clients_are_not_refused(proxy, account):
    assert statuses(proxy, "/version", [account] * 50) == {200: 50}
    # A class behind one address: the limit of an account is its own. The names are made up, so MLflow answers 401.
    names = [(f"{account[0]}-{number}", "x") for number in range(50)] * 4
    assert statuses(proxy, "/version", names) == {401: 200}


def test_passwords_can_not_be_tried_without_end(proxy, account):
    wrong = [(account[0], "not-the-password")] * 40
    found = statuses(proxy, "/api/2.0/mlflow/users/current", wrong)
    assert set(found) == {401, 429} and found[429] > 10


@pytest.mark.parametrize(
    "path",
    [
        "/gateway/mlflow/v1/models",
        "/ajax-api/2.0/mlflow/gateway-proxy",
        "/api/3.0/mlflow/gateway/secrets/list",
        "/ajax-api/3.0/mlflow/assistant/config",
        "/ajax-api/3.0/mlflow/demo/generate",
        "//ajax-api/3.0/mlflow/assistant/config",
        "/ajax-api/3.0/mlflow/%61ssistant/config",
    ],
)
def test_what_is_of_the_whole_server_is_denied(proxy, workshop, path):
    answer = requests.get(proxy.url + path, auth=workshop.admin, verify=proxy.certificate)
    assert answer.status_code == 403 and "nginx" in answer.text


def test_a_foreign_host_is_refused_through_it_too(proxy, workshop):
    foreign = {"Host": "evil.example"}
    answer = requests.get(f"{proxy.url}/", headers=foreign, auth=workshop.admin, verify=proxy.certificate)
    assert answer.status_code == 403 and "Host" in answer.text
