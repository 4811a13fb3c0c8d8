#!/usr/bin/env python3
"""Installs Detectron2 into the Python that runs this script.

Detectron2 is not on PyPI. Its unmodified Python sources are, inside the wheel of another project: LabGym 3.1.2 carries
them (Apache-2.0) under the import prefix ``LabGym.detectron2``. This script fetches that one wheel without its
dependencies, checks its SHA-256, restores the prefix, packs a wheel ``detectron2`` with Detectron2's own requirements
and licence, and hands it to pip. No compiler is needed. The compiled parts of Detectron2 (rotated boxes, deformable
convolution v1/v2, the fast COCO evaluator) are absent; dn_detr_d2 needs none of them.

    python tools/install_detectron2.py                       # the default described above
    python tools/install_detectron2.py --upstream            # from GitHub at a pinned commit, compiled
    python tools/install_detectron2.py --upstream COMMIT     # from GitHub at COMMIT

``detectron2.model_zoo`` finds its configs with pkg_resources, which setuptools 82 and later no longer have; the sources
are packed with importlib.resources in its place. An importable Detectron2 is kept, whoever installed it, but for this
one repair: run the script again if ``from detectron2 import model_zoo`` fails. Only the standard library is used.
"""

import argparse
import base64
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

CARRIER = "LabGym==3.1.2"
CARRIER_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
CARRIER_PREFIX = "LabGym/detectron2/"
VERSION = "0.6+labgym3.1.2"
UPSTREAM = "git+https://github.com/facebookresearch/detectron2.git"
UPSTREAM_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
# What detectron2's own setup.py asks for (black, a formatter it lists, only prettifies LazyConfig dumps).
REQUIREMENTS = (
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.5",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.11",
    "omegaconf>=2.1,<2.4",
    "hydra-core>=1.1",
    "black",
    "packaging",
)
MODEL_ZOO = "detectron2/model_zoo/model_zoo.py"
# (what pkg_resources is used for, the same without it); the blanks of the call differ between versions
WITHOUT_PKG_RESOURCES = (
    (rb"^import pkg_resources\b", b"from importlib import resources"),
    (
        rb"pkg_resources\.resource_filename\(\s*"
        rb"\"detectron2\.model_zoo\",\s*os\.path\.join\(\"configs\", config_path\)\s*\)",
        b'str(resources.files("detectron2.model_zoo").joinpath("configs", config_path))',
    ),
)
LICENSE = Path(__file__).resolve().parent.parent / "LICENSE"  # Apache-2.0, detectron2's licence and ours


class InstallError(RuntimeError):
    """A step that failed, with the way out; nothing has been installed."""


def main(argv=None):
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Install Detectron2 into this Python.")
    parser.add_argument(
        "--upstream",
        nargs="?",
        const=UPSTREAM_COMMIT,
        metavar="COMMIT",
        help="build facebookresearch/detectron2 from GitHub at COMMIT instead of repacking the sources from PyPI",
    )
    args = parser.parse_args(argv)
    try:
        if installed := find_installed():
            print(f"detectron2 {installed[0]} is already installed at {installed[1]}; keeping it.")
            repair_installed(Path(installed[1]))
        elif args.upstream:
            install_upstream(args.upstream)
            importlib.invalidate_caches()
            if installed := find_installed():
                repair_installed(Path(installed[1]))
        else:
            install_from_pypi()
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def find_installed():
    """(version, folder) of the importable detectron2, or None."""
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        return None
    try:
        version = metadata.version("detectron2")
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    return version, str(Path(spec.origin).parent)


def without_pkg_resources(content, name):
    """The source ``content`` of the module file ``name`` with importlib.resources in place of pkg_resources."""
    for pattern, replacement in WITHOUT_PKG_RESOURCES:
        content = re.sub(pattern, replacement, content, flags=re.MULTILINE)
    if b"pkg_resources" in content:
        raise InstallError(
            f"{name} uses pkg_resources in a way that this script does not know; install setuptools<82, which has it"
        )
    return content


def repair_installed(package):
    """Repairs ``detectron2.model_zoo`` in the installed package folder ``package``, if it needs pkg_resources."""
    path = package.parent / MODEL_ZOO
    if not path.is_file() or b"pkg_resources" not in (before := path.read_bytes()):
        return
    content = without_pkg_resources(before, path)
    part = path.with_suffix(".part")
    try:
        part.write_bytes(content)
        part.chmod(path.stat().st_mode & 0o777)
        os.replace(part, path)
        update_records(package.parent, content)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InstallError(
            f"{path} needs pkg_resources, and cannot be repaired: {error.strerror}; run this script as the user who owns it"
        ) from None
    print(f"Repaired {path}: importlib.resources in place of pkg_resources, which setuptools 82 and later do not have.")


def update_records(site, content):
    """Gives pip's list of the installed files of detectron2 in ``site`` the new hash of the repaired one."""
    for record in site.glob("detectron2-*.dist-info/RECORD"):
        lines = record.read_text(encoding="utf-8").splitlines(keepends=True)
        lines = [record_line(MODEL_ZOO, content) if x.startswith(f"{MODEL_ZOO},") else x for x in lines]
        record.write_text("".join(lines), encoding="utf-8")


def install_upstream(commit):
    """pip-installs detectron2 from GitHub at ``commit``; needs network, a C++ compiler and an installed torch."""
    print(f"Installing detectron2 from GitHub at {commit} (compiles; several minutes) ...")
    pip(
        ["install", "--no-build-isolation", f"{UPSTREAM}@{commit}"],
        f"GitHub commit {commit} could not be installed: check the network, git, a C++ compiler and that torch is "
        "installed, or run this script without --upstream",
    )


def install_from_pypi():
    """Repacks the sources that the carrier wheel holds, and installs them."""
    with tempfile.TemporaryDirectory(prefix="detectron2-") as folder:
        print(f"Fetching the Python sources of detectron2 inside {CARRIER} from PyPI ...")
        wheel = repack(fetch_carrier(Path(folder)), Path(folder))
        print(f"Installing {wheel.name} ...")
        pip(["install", str(wheel)], "detectron2's requirements could not be installed; see pip's message above")
    print(f"Installed detectron2 {VERSION}.")


def fetch_carrier(folder):
    """Downloads the carrier wheel into ``folder`` and checks its hash; returns its path."""
    pip(
        ["download", "--no-deps", "--ignore-requires-python", "--only-binary=:all:", "--dest", str(folder), CARRIER],
        f"{CARRIER} could not be downloaded: check the connection to PyPI (or your index, PIP_INDEX_URL), "
        "or use --upstream",
    )
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != CARRIER_SHA256:
        raise InstallError(
            f"{wheel.name} has SHA-256 {found}, expected {CARRIER_SHA256}: the file is damaged or not the published "
            "one; clear pip's cache (pip cache purge) and try again, or use --upstream"
        )
    return wheel


def repack(carrier, folder):
    """Writes a detectron2 wheel from the carrier's files, with the import prefix restored; returns its path."""
    info = f"detectron2-{VERSION}.dist-info"
    files = {}
    with zipfile.ZipFile(carrier) as archive:
        for name in archive.namelist():
            if name.startswith(CARRIER_PREFIX) and not name.endswith("/"):
                content = archive.read(name)
                content = content.replace(b"LabGym.detectron2", b"detectron2")
                files[name.removeprefix("LabGym/")] = without_pkg_resources(content, name)
    if left := [name for name, content in files.items() if b"LabGym" in content]:
        raise InstallError(f"{carrier.name} holds unexpected references to LabGym in {left[0]}; use --upstream")

    requires = "".join(f"Requires-Dist: {requirement}\n" for requirement in REQUIREMENTS)
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.4\nName: detectron2\nVersion: {VERSION}\n"
        "Summary: Detectron2, Python sources only (repacked by dn_detr_d2/tools/install_detectron2.py)\n"
        f"License-Expression: Apache-2.0\nLicense-File: LICENSE\nRequires-Python: >=3.7\n{requires}"
    ).encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: dn_detr_d2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/licenses/LICENSE"] = LICENSE.read_bytes()
    files[f"{info}/RECORD"] = (
        "".join(record_line(n, c) for n, c in files.items()).encode() + f"{info}/RECORD,,\n".encode()
    )

    wheel = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


def record_line(name, content):
    """One line of a wheel's RECORD: path, hash, size."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"


def pip(arguments, failure):
    """Runs pip of this Python; raises :class:`InstallError` with the sentence ``failure``."""
    if shutil.which(sys.executable) is None or importlib.util.find_spec("pip") is None:
        raise InstallError(f"{sys.executable} has no pip: run '{sys.executable} -m ensurepip' first")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    if subprocess.run(command).returncode != 0:
        raise InstallError(f"{failure}. Nothing was changed in {sys.prefix}.")


if __name__ == "__main__":
    sys.exit(main())
