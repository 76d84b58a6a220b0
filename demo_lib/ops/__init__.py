"""Running things: each room is called by a command of the same name or by a lesson, and calls the core.

`processes` starts programs that end with their owner, which `guard` sees to, and finds ports. `batch` runs lessons,
`workers` a study's trials in processes, `reproduce` trains a run again, `doctor` looks at the machine.
"""
