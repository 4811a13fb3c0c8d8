#!/usr/bin/env python3
"""Writes a trained detector as ONNX, or for torch.export and AOTInductor; the same as ``dn-detr export``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dn_detr_d2.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
