"""Imported first by what needs Detectron2: says how to install it where it is missing."""

from .requirements import is_installed

if not is_installed("detectron2"):
    raise ModuleNotFoundError(
        "this part of dn_detr_d2 needs detectron2, which is not on PyPI; run: python tools/install_detectron2.py",
        name="detectron2",
    )
