"""All it takes to run an MLflow tracking server for a team.

A call travels so: the command line (`__main__`) reads the `settings`, secrets included, and hands them as one object to
a module. `process` refuses, starts, watches and stops the server, `database` is what it stands on, `background` does it
all for a notebook. `readiness` asks a running server by `client`, as do `participants`, `progress` and `cleanup`.
`backup` copies database and artifacts, and restores them.
"""
