"""Ctrl-C, and the signals that end a process."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from nm_jax.cli import _exits as exits

SAID = "interrupted, and nothing was written"
_ENDING = ("SIGTERM", "SIGHUP")


def stop(number: int, frame: FrameType | None) -> None:
    """Ends by an exception, so that half-written files are removed."""
    del number, frame
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends at once."""
    del number, frame
    os.write(2, f"nm-jax: {SAID}\n".encode())
    os._exit(exits.INTERRUPTED)


def catch(ctrl_c: bool) -> None:
    """From now on signals end the process by `stop`; Ctrl-C too, if asked for, but where it is ignored already, as in
    background jobs."""
    for name in _ENDING:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    if ctrl_c and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """While modules are loaded, signals end the process at once: nothing is written yet, and an exception in the middle
    of loading a compiled module is a crash."""
    caught = []
    if threading.current_thread() is threading.main_thread():
        caught = [number for number in signal.Signals if signal.getsignal(number) is stop]
    for number in caught:
        signal.signal(number, _leave)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, stop)
