"""`python -m yolo_kd` is `yolo-kd`."""

import sys

from yolo_kd.cli import main

sys.exit(main())
