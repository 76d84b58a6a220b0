"""Ctrl-C and SIGTERM: exceptions, so that what is open is closed, at any moment and in the middle of a query."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM came; raised so that `with` blocks and generators end before the process does."""


def release_locks(error: BaseException) -> None:
    """Let go of what the error cut off: a query keeps SQLite locked as long as the frames in its traceback live."""
    traceback.clear_frames(error.__traceback__)


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that what the block must clean up is cleaned up, and then send it again."""

    def handler(signum: int, frame: object) -> None:
        raise Terminated

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            return before(lost)
        # It came in a `__del__`, where Python drops exceptions.
        signum = signal.SIGTERM if lost.exc_type is Terminated else signal.SIGINT
        threading.Timer(0.1, signal.raise_signal, [signum]).start()

    before, sys.unraisablehook = sys.unraisablehook, hook
    try:
        with signals({signal.SIGTERM: handler}):
            yield
    except Terminated:
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    finally:
        sys.unraisablehook = before


@contextmanager
def signals(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Handle signals like this in the block, in the main thread: no other can."""
    here = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items() if here}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
