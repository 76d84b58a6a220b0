"""With accounts on: nobody gets in, and a participant gets at nothing of another's, on every route of the server."""

import json
import os
import re
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import requests

from server.process import auth_config, environment
from tests.conftest import ROOT

pytestmark = pytest.mark.xdist_group("server")

API2, API3, FILES = "/api/2.0/mlflow", "/api/3.0/mlflow", "/api/2.0/mlflow-artifacts/artifacts"
PUBLIC = {"GET /health", f"GET {API3}/server-info", "GET /static-files/<path>"}

# What a participant may call because nothing of another's is in it. Paths of the UI, /ajax-api, are as /api.
OPEN = {
    "the UI and the version": {"GET /", "GET /version", f"GET {API3}/ui-telemetry", f"POST {API3}/ui-telemetry"},
    "one's own account": {f"GET {API2}/users/current", f"GET {API3}/users/current/permissions"},
    "the names of accounts, see test_accounts_show_no_more_than_names": {f"GET {API2}/users/list"},
    "makes something of one's own": {
        f"POST {API2}/experiments/create",
        f"POST {API2}/registered-models/create",
        f"POST {API3}/gateway/endpoints/create",
        f"POST {API3}/gateway/secrets/create",
        f"POST {API3}/mcp-servers",
    },
    "the same for everyone": {
        *(f"GET {API3}/gateway/{name}" for name in ("provider-config", "supported-models", "supported-providers")),
        *(f"GET {API3}/gateway/budgets/{name}" for name in ("get", "list", "windows")),
        f"GET {API3}/gateway/secrets/config",
    },
    "off here: no jobs, no workspaces": {"POST /api/3.0/jobs/", f"GET {API3}/workspaces"},
    "answers nothing but an error: it reads a body, and finds no endpoint's name": {
        "GET /graphql",
        "POST /gateway/openai/v1/responses/compact",
    },
    "of the whole server, and denied by server/nginx.conf": {
        *(f"{method} {API2}/gateway-proxy" for method in ("GET", "POST")),
        *(f"{method} {API3}/assistant/config" for method in ("GET", "PUT")),
        *(f"GET {API3}/assistant/providers{rest}" for rest in ("", "/<provider>/health", "/<provider>/models")),
        f"PATCH {API3}/assistant/sessions/<session_id>",
        *(f"POST {API3}/assistant/sessions/<session_id>/{name}" for name in ("permission", "tool-result")),
        f"GET {API3}/assistant/sessions/<session_id>/stream",
        f"POST {API3}/assistant/message",
        f"POST {API3}/assistant/skills/install",
        f"POST {API3}/demo/generate",
    },
}
# What answers with those things that the caller may read.
FILTERED = {
    *(f"{method} {API2}/experiments/search" for method in ("GET", "POST")),
    f"POST {API2}/runs/search",
    f"POST {API2}/logged-models/search",
    f"GET {API2}/registered-models/search",
    f"GET {API2}/model-versions/search",
    *(f"GET {API3}/gateway/{name}/list" for name in ("endpoints", "model-definitions", "secrets")),
    "GET /gateway/mlflow/v1/models",
    f"GET {API3}/mcp-servers",
    f"GET {API3}/mcp-servers/endpoints",
    f"GET {API3}/scorers/online-configs",
    "POST /api/3.0/jobs/search",
    "POST /graphql",
}
EMPTY = {
    f"GET {API3}/mcp-servers/endpoints",
    f"GET {API3}/scorers/online-configs",
    "POST /api/3.0/jobs/search",
}  # what the owner has nothing in either


@dataclass
class People:
    """Two participants without grants, and everything that the first one made: its names have `marker`."""

    owner: requests.Session
    other: requests.Session
    owner_name: str
    marker: str
    ids: dict


@pytest.fixture(scope="module")
def routes(workshop, tmp_path_factory):
    """Every route of the server, as pairs of method and path."""
    folder = tmp_path_factory.mktemp("routes")
    address = f"sqlite:///{folder / 'auth.db'}"
    (folder / "auth.ini").write_text(auth_config(address))
    variables = environment(workshop.settings, address)
    variables |= {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini")}
    command = [sys.executable, "-m", "tests.tools.routes"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=os.environ | variables)
    return [tuple(line.split(" ", 1)) for line in listed.stdout.splitlines()]


@pytest.fixture(scope="module")
def people(workshop):
    marker = f"marker{uuid.uuid4().hex[:8]}"
    owner_name, other_name = (f"{name}-{uuid.uuid4().hex[:8]}" for name in ("ada", "ben"))
    for name in (owner_name, other_name):
        answer = requests.post(
            f"{workshop.url}{API2}/users/create",
            json={"username": name, "password": f"{name}-word"},
            auth=workshop.admin,
        )
        assert answer.status_code == 200, answer.text
    owner, other = (session(name, f"{name}-word") for name in (owner_name, other_name))
    return People(owner, other, owner_name, marker, make_things(owner, workshop.url, marker))


def session(name, password):
    """Return a session that logs in, whatever a netrc file says."""
    made = requests.Session()
    made.auth, made.trust_env = (name, password), False
    return made


def make_things(owner, url, marker):
    """Make one thing of each kind, and return their ids under the names that MLflow's routes give them."""

    def make(path, *keys, **body):
        answer = owner.post(url + path, json=body)
        assert answer.status_code == 200, f"{path}: {answer.text}"
        found = answer.json()
        for key in keys:
            found = found[key]
        return found

    experiment = make(f"{API2}/experiments/create", "experiment_id", name=marker)
    run = make(f"{API2}/runs/create", "run", "info", "run_id", experiment_id=experiment, run_name=marker)
    make(f"{API2}/runs/log-metric", run_id=run, key=marker, value=1.0, timestamp=1, step=1)
    page = f"{experiment}/{run}/artifacts/page.html"
    assert owner.put(f"{url}{FILES}/{page}", data=f"<script>{marker}</script>").status_code == 200
    ids = {"experiment_id": experiment, "run_id": run, "run_uuid": run, "artifact_path": page, "path": "page.html"}
    ids |= {"source": f"mlflow-artifacts:/{page.rpartition('/')[0]}"}
    ids |= _make_models(make, marker, ids) | _make_traces(make, marker, experiment)
    return ids | _make_gateway(make, marker) | _make_reviews(make, marker, experiment)


def _make_models(make, marker, ids):
    model = make(f"{API2}/logged-models", "model", "info", "model_id", experiment_id=ids["experiment_id"], name=marker)
    make(f"{API2}/registered-models/create", name=marker)
    make(f"{API2}/model-versions/create", name=marker, source=ids["source"], run_id=ids["run_id"])
    make(f"{API2}/registered-models/alias", name=marker, alias="champion", version="1")
    return {"model_id": model, "version": "1", "alias": "champion"}


def _make_traces(make, marker, experiment):
    where = {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": experiment}}
    info = {"trace_id": f"tr-{uuid.uuid4().hex}", "trace_location": where, "request_preview": marker, "state": "OK"}
    info |= {"request_time": "2026-01-01T00:00:00Z", "execution_duration": "1s"}
    trace = make(f"{API3}/traces", "trace", "trace_info", "trace_id", trace={"trace_info": info})
    judged = {"assessment_name": "good", "trace_id": trace, "feedback": {"value": True}}
    judged |= {"source": {"source_type": "HUMAN", "source_id": marker}, "create_time": "2026-01-01T00:00:00Z"}
    judged |= {"last_update_time": "2026-01-01T00:00:00Z"}
    assessment = make(f"{API3}/traces/{trace}/assessments", "assessment", "assessment_id", assessment=judged)
    return {"trace_id": trace, "request_id": trace, "assessment_id": assessment}


def _make_gateway(make, marker):
    given = {"secret_name": marker, "secret_value": {"api_key": marker}, "provider": "openai"}
    secret = make(f"{API3}/gateway/secrets/create", "secret", "secret_id", **given)
    given = {"name": marker, "secret_id": secret, "provider": "openai", "model_name": "gpt-4o"}
    definition = make(f"{API3}/gateway/model-definitions/create", "model_definition", "model_definition_id", **given)
    linked = [{"model_definition_id": definition, "linkage_type": "PRIMARY", "weight": 1.0}]
    endpoint = make(f"{API3}/gateway/endpoints/create", "endpoint", "endpoint_id", name=marker, model_configs=linked)
    make(f"{API3}/mcp-servers", name=f"io.test/{marker}")
    return {"secret_id": secret, "model_definition_id": definition, "endpoint_id": endpoint, "endpoint_name": marker}


def _make_reviews(make, marker, experiment):
    here = {"experiment_id": experiment, "name": marker}
    scorer = {"name": marker, "builtin_scorer_class": "Safety", "builtin_scorer_pydantic_data": {"name": marker}}
    make(f"{API3}/scorers/register", **here, serialized_scorer=json.dumps(scorer))
    return {
        "dataset_id": make(
            f"{API3}/datasets/create", "dataset", "dataset_id", name=marker, experiment_ids=[experiment]
        ),
        "issue_id": make(f"{API3}/issues", "issue", "issue_id", **here, description=marker, status="pending"),
        "schema_id": make(
            f"{API3}/label-schemas/create",
            "label_schema",
            "schema_id",
            **here,
            type="FEEDBACK",
            title=marker,
            input={"text": {}},
        ),
        "queue_id": make(f"{API3}/review-queues/create", "review_queue", "queue_id", **here, queue_type="CUSTOM"),
    }


def ask(session, url, route, people):
    """Call a route with every id of the owner's that it could take, in the path, and in the query or body."""
    method, path = route
    ids = people.ids
    values = ids | {
        "name": people.marker, "experiment_name": people.marker, "model": people.marker, "username": people.owner_name,
        "experiment_ids": [ids["experiment_id"]], "run_ids": [ids["run_id"]], "trace_ids": [ids["trace_id"]],
        "request_ids": [ids["trace_id"]], "new_name": f"{people.marker}-taken", "password": "a-new-password",
        "key": people.marker, "tag_key": people.marker, "metric_key": people.marker, "value": "1", "timestamp": "1",
        "is_admin": True, "permission": "MANAGE", "resource_type": "experiment", "resource_id": ids["experiment_id"],
        "role_id": "1", "max_results": 100, "status": "FINISHED", "scorer_ids": ["none"], "webhook_id": "1",
        "job_id": str(uuid.UUID(int=1)),
    }  # fmt: skip
    if "/presigned-upload-url" in path:
        del values["model_id"]  # it takes one of the two
    places = values | ({"name": f"io.test/{people.marker}"} if "/mcp-servers" in path else {})
    filled = re.sub(r"<(\w+)>", lambda found: str(places.get(found[1], "1")), path)
    query = {"query": graphql(people)} if path == "/graphql" else values
    options = {"params": query} if method == "GET" or "/upload-artifact" in path else {"json": query}
    headers = {"X-Mlflow-Experiment-Id": ids["experiment_id"]}
    return session.request(method, url + filled, **options, headers=headers, timeout=60, allow_redirects=False)


def graphql(people):
    experiment, run = people.ids["experiment_id"], people.ids["run_id"]
    return (
        f'{{ mlflowGetExperiment(input: {{experimentId: "{experiment}"}}) {{ experiment {{ name }} }} '
        f'mlflowGetRun(input: {{runId: "{run}"}}) {{ run {{ info {{ runName }} }} }} '
        f'mlflowListArtifacts(input: {{runId: "{run}"}}) {{ files {{ path }} }} }}'
    )


def plain(route):
    """Return a route as the lists above have it."""
    return " ".join(route).replace("/ajax-api/", "/api/")


def sweep(session, workshop, routes, people):
    """Return the answer of each route."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(routes, pool.map(lambda route: ask(session, workshop.url, route, people), routes), strict=True))


@pytest.mark.slow
def test_nobody_gets_in(workshop, routes, people):
    nobody = session("", "")
    nobody.auth = None
    assert len(routes) > 400
    let_in = {route for route, answer in sweep(nobody, workshop, routes, people).items() if answer.status_code != 401}
    assert {plain(route) for route in let_in} == PUBLIC


@pytest.mark.slow
def test_a_wrong_password_gets_nobody_in(workshop, routes, people):
    wrong = session(people.owner_name, "not-the-password")
    # Checking a password takes most of a request: one route each of what a path begins with.
    one_each = {tuple(route[1].split("/")[:4]): route for route in routes if plain(route) not in PUBLIC}
    answers = sweep(wrong, workshop, list(one_each.values()), people)
    assert len(answers) > 12
    assert {answer.status_code for answer in answers.values()} == {401}


@pytest.mark.slow
def test_a_participant_gets_at_nothing_of_anothers(workshop, routes, people):
    known = PUBLIC | FILTERED | set().union(*OPEN.values())
    assert known <= {plain(route) for route in routes}, "listed here, and no route any more"
    before = state(workshop, people)
    refused = sweep(people.other, workshop, [route for route in routes if plain(route) not in known], people)
    assert {route: answer.status_code for route, answer in refused.items() if answer.status_code != 403} == {}
    assert state(workshop, people) == before

    reads = [route for route in refused if route[0] == "GET" and plain(route).split("/")[-1] in ("get", "info", "list")]
    allowed = [answer for answer in sweep(people.owner, workshop, reads, people).values() if answer.status_code == 200]
    assert len(allowed) > 20  # the same requests, by the owner: it is the person that is refused


@pytest.mark.slow
def test_lists_have_only_what_one_may_read(workshop, routes, people):
    filtered = [route for route in routes if plain(route) in FILTERED]
    for route, answer in sweep(people.other, workshop, filtered, people).items():
        assert answer.status_code == 200 and people.marker not in answer.text, (route, answer.text)
        assert "page.html" not in answer.text
    for route, answer in sweep(people.owner, workshop, filtered, people).items():
        assert plain(route) in EMPTY or people.marker in answer.text, (route, answer.text)


def test_accounts_show_no_more_than_names(workshop, people):
    listed = people.other.get(f"{workshop.url}{API2}/users/list").json()["users"]
    assert {key for user in listed for key in user} <= {"id", "username", "is_admin", "roles"}
    assert {user["username"]: user["roles"] for user in listed}[people.owner_name] == []
    own = people.owner.get(f"{workshop.url}{API2}/users/list").json()["users"]  # who sees the grants that she has
    assert [user["username"] for user in own if user["roles"]] == [people.owner_name]


def state(workshop, people):
    """Return what the owner has, as the administrator sees it."""
    ids = people.ids
    paths = [
        f"{API2}/experiments/get?experiment_id={ids['experiment_id']}",
        f"{API2}/runs/get?run_id={ids['run_id']}",
        f"{API2}/artifacts/list?run_id={ids['run_id']}",
        f"{API2}/logged-models/{ids['model_id']}",
        f"{API2}/registered-models/get?name={people.marker}",
        f"{API3}/traces/{ids['trace_id']}",
        f"{API3}/datasets/{ids['dataset_id']}",
        f"{API3}/gateway/secrets/get?secret_id={ids['secret_id']}",
        f"{API3}/users/permissions/list?username={people.owner_name}",
    ]
    answers = [requests.get(workshop.url + path, auth=workshop.admin) for path in paths]
    assert [answer.status_code for answer in answers] == [200] * len(paths)
    return [answer.json() for answer in answers]


@pytest.mark.parametrize("host", ["10.evil.example", "192.168.evil.example", "127.0.0.1.evil.example", "localhost:1"])
def test_a_foreign_host_is_refused(workshop, host):
    answer = requests.get(f"{workshop.url}/version", headers={"Host": host}, auth=workshop.admin)
    page = requests.get(f"{workshop.url}/", headers={"Host": host}, auth=workshop.admin)
    assert page.status_code == 403 and "Host" in page.text
    assert answer.text != page.text  # the version tells nothing, so MLflow answers it to any host


@pytest.mark.parametrize("origin", ["https://evil.example", "http://10.evil.example", "null"])
def test_a_foreign_origin_changes_nothing(workshop, people, origin):
    call = {"json": {"name": f"from-{uuid.uuid4().hex}"}, "headers": {"Origin": origin}}
    assert people.owner.post(f"{workshop.url}{API2}/experiments/create", **call).status_code == 403
    call["headers"] = {"Origin": workshop.url}
    assert people.owner.post(f"{workshop.url}{API2}/experiments/create", **call).status_code == 200


UPWARDS = ["..", "%2e%2e", "%252e%252e", "..%5c..", "..%00", "%2e%2e%2f%2e%2e"]


@pytest.mark.slow
@pytest.mark.parametrize("up", UPWARDS)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_no_artifact_path_leads_out_of_the_folder(workshop, people, method, up):
    outside = workshop.settings.folder / "outside.txt"
    outside.write_text(people.marker)
    before = set(workshop.settings.folder.iterdir())
    own = people.ids["artifact_path"].rpartition("/")[0]
    for path in (f"{own}/{'/'.join([up] * 4)}/outside.txt", f"{own}/{outside}", f"{own}/file:{outside}"):
        for person in (people.owner.auth, workshop.admin):
            answer = raw(method, f"{workshop.url}{FILES}/{path}", person)
            assert people.marker not in answer.text, path
    assert outside.read_text() == people.marker
    assert set(workshop.settings.folder.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("path", [*(f"{up}/{up}" for up in UPWARDS), "/etc", "file:///etc", "..\\..", "a\0b"])
def test_no_folder_but_ones_own_is_listed(workshop, people, path):
    for route, name in ((f"{API2}/artifacts/list", "path"), ("/get-artifact", "path"), (FILES, "path")):
        query = {"run_id": people.ids["run_id"], name: path.replace("%2e", ".").replace("%25", "%")}
        answer = people.owner.get(workshop.url + route, params=query)
        if answer.ok:  # a name with a backslash is a plain name in one's own folder
            assert not re.search("outside.txt|auth.ini|passwd", answer.text), (route, answer.text)


def raw(method, url, login):
    """Send a path as it is: requests would tidy it up."""
    with session(*login) as sender:
        prepared = sender.prepare_request(requests.Request(method, url, data="changed" if method == "PUT" else None))
        prepared.url = url
        return sender.send(prepared, allow_redirects=False, timeout=20)


def test_a_page_in_the_artifacts_is_downloaded_not_shown(workshop, people):
    run, path = people.ids["run_id"], people.ids["artifact_path"]
    for address in (f"/get-artifact?run_id={run}&path=page.html", f"{FILES}/{path}"):
        answer = people.owner.get(workshop.url + address)
        assert answer.status_code == 200 and people.marker in answer.text
        assert answer.headers["Content-Disposition"].startswith("attachment")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_the_ui_is_framed_by_nobody(workshop):
    assert workshop.settings.x_frame_options == "DENY"
    assert requests.get(f"{workshop.url}/", auth=workshop.admin).headers["X-Frame-Options"] == "DENY"
