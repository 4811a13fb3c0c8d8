#!/usr/bin/env python3
"""Checks, repairs and splits a data set in COCO's format; the same as ``dn-detr check``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dn_detr_d2.commands.check import main

if __name__ == "__main__":
    sys.exit(main())
