"""A worker process that makes a function once and then answers calls with it."""

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
    """The worker process. It ends with its parent and ignores Ctrl-C, which the parent alone handles.

    Args:
        make: called once in the worker, with ``arguments``. It returns the function that each ``send`` calls. The
            function's first argument is a callable that sends a message back; the arguments of ``send`` follow.
        arguments: arguments of ``make``; they must be picklable.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        # Not fork: this process may already run threads of OpenCV or of an inference runtime.
        context = multiprocessing.get_context("spawn")
        self._link, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
        os.environ["PYTHONSAFEPATH"] = "1"  # from Python 3.11 on: imports nothing from the working directory, as here
        self._process.start()
        del os.environ["PYTHONSAFEPATH"]
        there.close()
        self.receive()

    def fileno(self) -> int:
        """For ``multiprocessing.connection.wait``."""
        return self._link.fileno()

    def send(self, *arguments: Any) -> bool:
        """Starts a call; returns False if the process is dead."""
        with suppress(OSError):
            self._link.send(arguments)
            return True
        return False

    def receive(self) -> Any:
        """Waits for the next message or answer; raises BackendError if the call failed or the process died."""
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
        """Kills the process: one in an endless loop would not react to anything milder."""
        self._process.kill()
        self._link.close()


def _serve(link: Connection, make: Callable[..., Callable[..., Any]], arguments: Tuple[Any, ...]) -> None:
    os.environ.pop("PYTHONSAFEPATH", None)  # not for the programs that a tracker starts
    os.dup2(2, 1)  # stdout is for the results
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError, AttributeError):  # Linux: the worker dies with its parent, even in an endless loop
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    made = _attempt(make, *arguments)
    failed = isinstance(made, BackendError)
    link.send(made if failed else None)
    with suppress(EOFError, OSError):
        while not failed:
            link.send(_attempt(made, link.send, *link.recv()))


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call, or its error in a form that can be pickled."""
    try:
        return function(*arguments)
    except Exception as error:
        return BackendError(str(error) if isinstance(error, AsymTrackError) else f"{type(error).__name__}: {error}")
