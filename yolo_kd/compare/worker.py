"""The process of one training. It ends with the comparison that started it, however the comparison ends.

`python -m yolo_kd.compare.worker SHARE MODULE WORD ...` runs `python -m MODULE WORD ...` and watches its standard
input, a pipe whose other end the comparison holds. When the comparison is stopped or killed, the pipe closes and the
whole process group is ended at once. Otherwise the training would keep the machine busy, and the next call of the
comparison would start it a second time.

SHARE is the number of processors for this training. Ultralytics derives the numbers of threads and of loader processes
from the number of processors, which is too many for each of several trainings at the same time.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import threading


def end_with_parent() -> None:
    """Wait until the other end of standard input closes, then end this process and its children."""
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Run the module that the command line names."""
    share, module, *words = sys.argv[1:]
    processors = max(1, int(share))
    os.cpu_count = lambda: processors
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
