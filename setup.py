"""Installs the package. Needs no compiler, no CUDA and no GPU; torch need not be there yet."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "dn_detr_d2" / "__init__.py").read_text()).group(1)

setup(
    name="dn-detr-d2",
    version=VERSION,
    description="DN-DETR for Detectron2: query denoising and the detectors it trains",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["dn_detr_d2", "dn_detr_d2.*"]),
    python_requires=">=3.10",
    # Detectron2 is not on PyPI: tools/install_detectron2.py installs it.
    install_requires=[
        "torch>=2.10",  # earlier releases let a checkpoint run code past weights_only
        "torchvision>=0.25",
        "scipy>=1.11",
        "fvcore>=0.1.5,<0.1.6",
        "pycocotools>=2.0.5",
    ],
    extras_require={
        "demo": ["opencv-python-headless>=4.8"],
        "dev": ["opencv-python-headless>=4.8", "pytest>=8", "hypothesis>=6.100", "ruff==0.17.5", "codespell>=2.3"],
    },
)
