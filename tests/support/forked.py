"""Starts `yolo-kd` in processes of their own without importing torch each time: one process imports it and forks.

A forked process has its own memory, files and signals, so killing it is the real thing; only its start is cheaper.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """Process that forks `yolo-kd` processes, one at a time; use it as a context manager."""

    _running: Child | None = None

    def __enter__(self) -> Server:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=240)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def start(self, arguments: Sequence[object], log: Path, file_size: int = 0, workers: int = 0) -> Child:
        """Start `yolo-kd` in a process group of its own.

        Args:
            arguments: Its words.
            log: Where its output goes.
            file_size: Largest size of a file that the system lets it write, in bytes; 0 for any.
            workers: Processes that load data, which Ultralytics does not use on a CPU by itself.
        """
        if self._running is not None and self._running.alive():  # left by a test that failed
            self._running.send(signal.SIGKILL)
            self._running.wait()
        log.write_text("")
        order = {"arguments": [str(a) for a in arguments], "log": str(log), "file_size": file_size, "workers": workers}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        self._running = Child(self, int(self._answer()), log)
        return self._running

    def run(self, arguments: Sequence[object], log: Path, file_size: int = 0) -> int:
        """Run `yolo-kd` to its end and return its exit code."""
        return self.start(arguments, log, file_size).wait()

    def _answer(self, timeout: float = 900) -> str:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise TimeoutError("the forked process has not ended")
        return self._process.stdout.readline()


class Child:
    """One forked `yolo-kd`."""

    def __init__(self, server: Server, pid: int, log: Path):
        self.pid = pid
        self.log = log
        self._server = server
        self._code: int | None = None

    def wait(self, timeout: float = 900) -> int:
        """Return the exit code, or minus the signal that ended it."""
        if self._code is None:
            self._code = int(self._server._answer(timeout))
        return self._code

    def alive(self) -> bool:
        """Return whether it still runs."""
        if self._code is None and select.select([self._server._process.stdout], [], [], 0)[0]:
            self.wait()
        return self._code is None

    def send(self, number: int, group: bool = False) -> None:
        """Send a signal, if it still runs, also to the processes it has started if `group`."""
        if self.alive():
            (os.killpg if group else os.kill)(self.pid, number)

    def wait_for(self, text: str, timeout: float = 480) -> None:
        """Wait until its output holds a text."""
        end = time.monotonic() + timeout
        while text not in self.log.read_text(errors="replace"):
            if time.monotonic() > end or not self.alive():
                raise AssertionError(f"'{text}' never came:\n{self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.005)


class Writes:
    """Tells at once when a file is made in a folder, by Linux' inotify; asking again and again would miss most."""

    def __init__(self, folder: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK)
        if libc.inotify_add_watch(self._descriptor, os.fsencode(folder), 0x100) < 0:  # IN_CREATE
            raise OSError(ctypes.get_errno(), f"{folder} cannot be watched")

    def close(self) -> None:
        """Stop watching."""
        os.close(self._descriptor)

    def wait_for(self, ending: str, count: int, child: Child) -> bool:
        """Wait until so many files whose names end so were made, and return whether they were while it ran."""
        while count > 0 and child.alive():
            if not select.select([self._descriptor], [], [], 0.2)[0]:
                continue
            events = os.read(self._descriptor, 4096)
            while events:  # wd, mask, cookie, length of the name: four numbers of four bytes, then the name
                length = int.from_bytes(events[12:16], sys.byteorder)
                count -= events[16 : 16 + length].rstrip(b"\0").decode().endswith(ending)
                events = events[16 + length :]
        return count <= 0


def _use_workers(trainer: Any, workers: int) -> None:
    train = trainer.train

    def with_workers(self: Any) -> Any:
        self.args.workers = workers
        return train(self)

    trainer.train = with_workers


def _serve() -> None:
    import torch

    from tests import conftest  # noqa: F401  (fonts and settings, as in the tests)
    from yolo_kd.cli import main
    from yolo_kd.engine import trainer

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            # as a shell starts it, whatever the tests' own process does with signals
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            descriptor = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            if order["file_size"]:
                import resource

                resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_size"], order["file_size"]))
            os.setsid()
            if order["workers"]:
                _use_workers(trainer.DistillationTrainer, order["workers"])
            code = 70
            try:
                code = main(order["arguments"])
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
