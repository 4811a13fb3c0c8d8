#!/usr/bin/env python3
"""Draws what a detector finds in images and videos, with the flags of Detectron2's demo; the same as ``dn-detr predict``."""

import sys

from dn_detr_d2.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())
