"""Start a kernel that never outlives its owner, who holds the other end of this program's standard input.

A kernel looks for its owner by itself, but not before it has started, and then not on every system.
"""

import atexit
import gc
import os
import runpy
import sys
from threading import Thread


def _follow(owner: int) -> None:
    os.read(owner, 1)  # nothing comes but the end
    os._exit(1)


if __name__ == "__main__":
    end = os.dup(0)  # what the cells start must not have it
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    Thread(target=_follow, args=[end], daemon=True).start()
    if not sys.flags.safe_path:
        del sys.path[0]  # this file's folder
    atexit.register(gc.freeze)  # or Python looks at its end for garbage in all that was imported: a second for PyTorch
    runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)
