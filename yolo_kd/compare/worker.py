"""The process of one training: it ends with the comparison that started it, however that one ends.

`python -m yolo_kd.compare.worker SHARE MODULE WORD ...` runs `python -m MODULE WORD ...` and watches its standard
input, whose other end the comparison holds. When that end closes, because the comparison was stopped or killed, the
whole process group is ended at once: a training without its comparison would keep the machine busy and would be
started a second time by the next call.

SHARE is the number of processors that this training may count on. Ultralytics takes its numbers of threads and of
loader processes from the processors it finds, which is too many for each of several trainings side by side.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def end_with_parent() -> None:
    """Wait until the other end of standard input closes, then end this process and its children."""
    try:
        while os.read(0, 1):
            pass
    except OSError:
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
