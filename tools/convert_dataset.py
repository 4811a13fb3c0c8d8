#!/usr/bin/env python3
"""Converts data sets of YOLO and Pascal VOC to COCO's format; the same as ``dn-detr convert yolo`` and ``voc``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dn_detr_d2.commands.convert_dataset import main

if __name__ == "__main__":
    sys.exit(main())
