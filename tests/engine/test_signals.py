"""The first signal asks, the second ends, and handlers are put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from yolo_kd.engine.signals import Interrupted, SignalWatch, Terminated, terminate_children


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, Interrupted), (signal.SIGTERM, Terminated)])
def test_the_first_signal_only_asks(number: int, error: type[BaseException], capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with SignalWatch() as watch:
        watch.patient = True
        signal.raise_signal(number)
        assert watch.received == number
    assert signal.getsignal(number) is before
    assert "a second signal ends at once" in capfd.readouterr().err
    stop = watch.stop("Stopped.")
    assert type(stop) is error
    assert str(stop) == "Stopped."
    assert stop.exit_code == 128 + number  # type: ignore[attr-defined]


def test_the_second_is_handled_as_if_nobody_watched() -> None:
    with SignalWatch() as watch:
        watch.patient = True
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_with_nothing_to_finish_the_first_ends_it(number: int, error: type[BaseException]) -> None:
    with SignalWatch(), pytest.raises(error):
        signal.raise_signal(number)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with SignalWatch() as watch:
            watch.patient = True
            signal.raise_signal(signal.SIGINT)
            assert watch.received is None
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_forked_worker_that_inherits_the_handler_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    with SignalWatch() as watch:
        watch.patient = True
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGINT)
            os._exit(7 if watch.received is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert "second signal" not in capfd.readouterr().err


def test_dying_workers_are_no_error_once_a_signal_is_there() -> None:
    """Torch's handler raises when a loader's worker dies, also while a checkpoint is being written."""

    def as_torch_does(*_: object) -> None:
        raise RuntimeError("DataLoader worker is killed by signal: Terminated")

    before = signal.signal(signal.SIGCHLD, as_torch_does)
    try:
        with SignalWatch() as watch:
            watch.patient = True
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGCHLD)
        assert signal.getsignal(signal.SIGCHLD) is as_torch_does
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_only_waits_passes_it_on(number: int) -> None:
    """As the parent of a multi-GPU run: it waits for a launcher, which ends its ranks when it is asked to."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    begun = time.monotonic()
    with SignalWatch(terminate_children) as watch:
        signal.raise_signal(number)
        assert child.wait(timeout=120) == -signal.SIGTERM
    assert watch.received == number
    assert time.monotonic() - begun < 30
