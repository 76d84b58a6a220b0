"""Running things: what the commands do besides training.

`processes` starts programs that end with their owner (`guard` sees to it) and knows ports. On it stand `workers`, which
join a study, and `ui`. `batch` runs lessons through papermill; `reproduce` trains a run again and compares; `projects`
is the repository as `mlflow run` sees it; `doctor` looks at the machine.
"""
