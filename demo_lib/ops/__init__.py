"""Running things; these modules call the core.

`processes` starts programs that end with their owner, which `guard` sees to, and finds ports. `batch` runs lessons: what
it has to do is in `jobs`, how one of them is done in `execution`, and `kernel` starts a kernel. `workers` runs a study's
trials in processes, `reproduce` trains a run again, `doctor` looks at the machine.
"""
