"""Handles SIGINT and SIGTERM during a training: the first signal requests a stop, the second ends the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

WATCHED = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A training was stopped by SIGINT, usually Ctrl-C. It is a `KeyboardInterrupt`, so callers treat it as one."""

    exit_code = 128 + signal.SIGINT


class Terminated(SystemExit):
    """A training was stopped by SIGTERM. If it is not caught, the process exits with 143, as shells expect."""

    exit_code = 128 + signal.SIGTERM

    def __init__(self, message: str = ""):
        super().__init__(self.exit_code)
        self.message = message

    def __str__(self) -> str:
        return self.message


class SignalWatch:
    """Turns the first SIGINT or SIGTERM into a request, and leaves the second to the previous handler.

    Handlers are installed on entry and restored on exit, in the main thread only, as Python requires. A signal that was
    ignored before (`nohup`, background jobs) stays ignored.

    Args:
        forward: Called with the signal when it arrives, for a process that only waits for others; None otherwise.

    Attributes:
        received: The signal that arrived, None before.
        patient: Whether the signal waits until the current batch is finished.
    """

    def __init__(self, forward: Callable[[int], None] | None = None):
        self.received: int | None = None
        self.patient = False
        self._forward = forward
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in WATCHED:
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):  # None: installed by C code, which cannot be restored
                    self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def name(self) -> str:
        """Name of the signal that arrived, such as SIGTERM."""
        return signal.Signals(self.received).name if self.received else ""

    def stop(self, message: str) -> BaseException:
        """Return the exception for the signal that arrived."""
        return Interrupted(message) if self.received == signal.SIGINT else Terminated(message)

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data loader's worker inherited this handler, and its batch is still needed
        if self.received is not None:
            self.__exit__()
            signal.raise_signal(number)
            return
        self.received = number
        self._expect_dying_workers()
        if self._forward is not None:
            self._forward(number)
        elif self.patient:
            # no logger here: the signal may have arrived while one was writing
            with suppress(OSError):
                os.write(2, _PROMISE.format(self.name).encode())
        else:
            raise self.stop(f"Stopped by {self.name} before the first batch.")

    def _expect_dying_workers(self) -> None:
        """Let workers that got the same signal end; torch's handler would raise while a file is being saved."""
        if self._before and hasattr(signal, "SIGCHLD") and (handler := signal.getsignal(signal.SIGCHLD)) is not None:
            self._before[signal.SIGCHLD] = handler
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


_PROMISE = "\n{}: finishing this batch and saving; a second signal ends at once.\n"


def terminate_children(_number: int = signal.SIGTERM) -> None:
    """Terminate every child process; a multi-GPU launcher passes the signal on to its workers."""
    import psutil

    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            child.terminate()
