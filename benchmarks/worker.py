"""A process of its own that makes something once and answers calls with it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Callable, Tuple

from asymtrack_edge.errors import AsymTrackError, BackendError


class Worker:
    """The process; ends with this one, which alone decides what an interrupt from the keyboard ends.

    Args:
        make: called once in the process, with ``arguments``. It returns a function, which is called for each ``send``
            with its arguments, after a function that sends a message back.
        arguments: what can be pickled.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        # Not fork: this process may already run threads of OpenCV or of an inference runtime.
        context = multiprocessing.get_context("spawn")
        self._link, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
        self._process.start()
        there.close()
        self.receive()

    def fileno(self) -> int:
        """For ``multiprocessing.connection.wait``."""
        return self._link.fileno()

    def send(self, *arguments: Any) -> bool:
        """Begins a call; False where the process is dead."""
        with suppress(OSError):
            self._link.send(arguments)
            return True
        return False

    def receive(self) -> Any:
        """Waits for the next message or answer; BackendError where the call failed or the process died."""
        try:
            answer = self._link.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            answer = BackendError(f"the worker process died ({ended})")
        if isinstance(answer, BackendError):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the process at once: what is in an endless loop of its own hears nothing milder."""
        self._process.kill()
        self._link.close()


def _serve(link: Connection, make: Callable[..., Callable[..., Any]], arguments: Tuple[Any, ...]) -> None:
    os.dup2(2, 1)  # stdout belongs to the results
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError, AttributeError):  # Linux: ends with its parent, even from within an endless loop
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    made = _attempt(make, *arguments)
    failed = isinstance(made, BackendError)
    link.send(made if failed else None)
    with suppress(EOFError, OSError):
        while not failed:
            link.send(_attempt(made, link.send, *link.recv()))


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result, or the error in a form that can travel."""
    try:
        return function(*arguments)
    except Exception as error:
        return BackendError(str(error) if isinstance(error, AsymTrackError) else f"{type(error).__name__}: {error}")
