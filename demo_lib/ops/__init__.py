"""Running things; these modules call the core.

`processes` starts programs that end with their owner, which `guard` sees to, and finds ports. `batch` runs lessons: its
`jobs` are planned first, `execution` is how one is done, `kernel` starts its kernel, `remote` hands them to a Dask
`cluster`, `records` are what the store knows of them. `workers` runs a study's trials in processes, `reproduce` trains
a run again, `doctor` looks at the machine.
"""
