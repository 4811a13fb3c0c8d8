#!/usr/bin/env python3
"""Converts a checkpoint of another project; the same as ``dn-detr convert checkpoint``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dn_detr_d2.commands.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
