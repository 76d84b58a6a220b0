"""List every route of MLflow's server with accounts on, as `METHOD PATH` lines: `python -m tests.tools.routes`.

The server's environment is needed (`server.process.environment`): making the app opens the database of the accounts.
"""

import os
import re

import demo_lib  # noqa: F401  # first: MLflow reads the quiet defaults that it sets when it is imported


def routes():
    """Return method and path of each route, Flask's and FastAPI's, with `<name>` for what a path takes."""
    os.environ["_MLFLOW_SGI_NAME"] = "uvicorn"  # as `mlflow server` does: with it the FastAPI routes are made too
    from mlflow.server import app, auth

    native = auth.create_app(app).routes
    found = {(method, rule.rule) for rule in app.url_map.iter_rules() for method in rule.methods}
    found |= {(method, path) for route in native for method, path in _flat(route)}
    plain = {(method, re.sub(r"<\w+:", "<", re.sub(r"{(\w+)(:\w+)?}", r"<\1>", path))) for method, path in found}
    return sorted(each for each in plain if each[0] not in ("HEAD", "OPTIONS"))


def _flat(route, prefix=""):
    if hasattr(route, "original_router"):  # FastAPI's include_router keeps the router whole
        for each in route.original_router.routes:
            yield from _flat(each, prefix + route.include_context.prefix)
    elif getattr(route, "methods", None):
        yield from ((method, prefix + route.path) for method in route.methods)


if __name__ == "__main__":
    print("\n".join(f"{method} {path}" for method, path in routes()))
