"""Copy a run to another store or server: its whole metric histories, files, models and children."""

from collections.abc import Iterator
from contextlib import suppress

from demo_lib.config import DemoError, settings, sqlite_file, sqlite_uri, without_login
from demo_lib.ops.copying import PARENT, Copying
from demo_lib.ops.originals import Original, family_of, used_models
from demo_lib.runs import find_run
from demo_lib.store import Login, artifact_root, open_store, own_model_name, own_name, reach, signed_in

import mlflow
from filelock import FileLock
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Run


def push(run_id: str, to: str, experiment: str = "", register: bool = False, login: Login = None) -> Run:
    """Copy the run, its children and their models from this store to the one at `to`, and return the run's copy.

    Prints first what stays behind. The copies are in `experiment`, made if it is not there; without one, in that of
    the same name, your own on a server with a login. The tag `copied_from` has the old id; other tags whose value is
    the id of a run or model that was copied get the new one. `register` registers the models' versions there, too.

    Called again, it copies what is new, and goes on where it was interrupted. A tag gets the value that it has here.
    A file of a run that was copied after its end is new if its path or its size is. `login`, a name and a password,
    is for `to` alone; without it, the login of the environment is sent to both stores.

    An unknown run, an address that is no store or that has this run, and an experiment that can't be used are a
    DemoError.
    """
    open_store()
    mlflow.clear_active_model()  # or each metric that is logged would belong to it
    first = find_run(run_id)
    family = family_of(first.info.run_id)
    name = MlflowClient().get_experiment(first.info.experiment_id).name
    if own_name(""):  # there is a login here: names begin with their owner's
        name = name.partition("/")[2] or name
    owner = own_model_name("")
    with signed_in(login):
        client = _open(to, first)
        copying = Copying(client, _find_experiment(client, experiment or name), login)
    for line in _losses(family, register):
        print(f"stays behind: {line}")
    folder = settings().home / "store"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".push.lock"):  # neither of two at once would find the other's copies
            for step in (copying.begin, copying.fill):
                for each in family:
                    step(each)
            for each in family if register else ():
                copying.register(each, owner)
            with signed_in(login):
                return client.get_run(copying.ids[first.info.run_id])
    except MlflowException as error:
        if error.get_http_status_code() != 403:
            raise
        raise DemoError(f"{to} refuses you (403): name an experiment of your own with --experiment.") from None


def _losses(family: list[Original], register: bool) -> Iterator[str]:
    """Say in a line each what is not copied."""
    client, ids = MlflowClient(), {each.run.info.run_id for each in family}
    models = {model.model_id: model for each in family for model in each.models}
    if family[0].run.data.tags.get(PARENT, family[0].run.info.run_id) not in ids:
        yield "the run's parent: push that one to copy the whole family"
    if count := sum(each.run.info.status == "RUNNING" for each in family):
        yield f"what the runs that still go on ({count} of {len(family)}) will log: push again when they have ended"
    asked = {"max_results": 1, "include_spans": False}
    places = {each.run.info.run_id: [each.run.info.experiment_id] for each in family}
    if count := sum(bool(client.search_traces(locations=at, run_id=of, **asked)) for of, at in places.items()):
        yield f"the traces of the runs ({count} of {len(family)} have some)"
    if count := len({each.model_id for original in family for each in used_models(original.run)} - models.keys()):
        yield f"the links to models of other runs ({count}), where those are not copied yet: push those first"
    if count := sum(point.run_id not in ids for model in models.values() for point in model.metrics or ()):
        yield f"the values that other runs logged for these models ({count}): push those runs as well"
    versions = [version for each in family for version in each.versions]
    if versions and not register:
        yield f"the registered versions of these models ({len(versions)}): add --register"
    elif versions:
        found = {alias for each in versions for alias in client.get_model_version(each.name, each.version).aliases}
        yield ", ".join(["the numbers of registered versions", *(f"the alias {alias}" for alias in sorted(found))])


def _open(to: str, first: Run) -> MlflowClient:
    """Return the client of the store at this address, which must not have the run itself."""
    if without_login(to) != to:
        raise DemoError("leave the login out of --to: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD have it.")
    file = sqlite_file(to)
    if file is None and not to.startswith(("http://", "https://")):
        raise DemoError(f"--to {to} is no store: give a server's http address, or sqlite:/// and the path of a file.")
    uri = sqlite_uri(file) if file else to
    reach(uri, "--to")
    client = MlflowClient(uri, uri)
    with suppress(MlflowException):
        client.get_run(first.info.run_id)
        raise DemoError(f"{to} has run {first.info.run_id} already: name another store.")
    return client


def _find_experiment(client: MlflowClient, name: str) -> str:
    """Return the id of the experiment of this name, or on a server with a login of your own; make it if need be."""
    name = own_name(name, client.tracking_uri)
    try:
        found = client.get_experiment_by_name(name)
        number = (
            found.experiment_id if found else client.create_experiment(name, artifact_root(client.tracking_uri, name))
        )
        if client.get_experiment(number).lifecycle_stage == "active":
            return number
        reason = "it is deleted"
    except MlflowException as error:
        reason = error.message.partition("\n")[0]
    raise DemoError(f"experiment {name!r} can't be used there ({reason}): name another with --experiment.") from None
