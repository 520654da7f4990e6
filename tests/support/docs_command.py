"""The command `yolo-kd` for scripts of the documentation, made small: `python -m tests.support.docs_command train`."""

from __future__ import annotations

import os
import sys

from tests.support.docs import shrunk


def main() -> int:
    """Run the command with its tiny settings, in the runs folder that DOCS_RUNS names."""
    import ultralytics.cfg

    from yolo_kd.cli import main as run

    ultralytics.cfg.TESTS_RUNNING = False
    ultralytics.cfg.SETTINGS = {"runs_dir": os.environ["DOCS_RUNS"]}

    return run(shrunk(["yolo-kd", *sys.argv[1:]])[1:])


if __name__ == "__main__":
    sys.exit(main())
