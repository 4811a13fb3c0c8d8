"""Reports versions, hardware and checks of this installation, as plain text to paste into an issue.

    dn-detr doctor
    dn-detr doctor --config-file configs/dn_dab_deformable.yaml MODEL.WEIGHTS output/dn/model_final.pth

In a checkout that is not installed, python -m dn_detr_d2.doctor is the same.

No compiler is needed: without the compiled operators everything runs on PyTorch's, slower, which is a note.
A line is "ok", a "note" (worth knowing, nothing to mend) or "BROKEN", then with the reason and the way out. The exit code is
1 if anything is broken, else 0. Nothing is downloaded or written.
"""

from .utils import needs_detectron2  # noqa: F401

# isort: split
import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from . import __version__
from .checkpoint import identify, read_checkpoint
from .checkpoint.packages import SCHEME, find_packaged
from .command_line import add_overrides, make_parser, parse
from .data import cache_folder, check_records, class_names, dataset_path
from .data.registered import register_data_sets
from .engine.setup import setup_cfg
from .errors import UserError
from .layers import kernel_is_broken, missing_kernel, ms_deform_attn
from .utils.processor import slow_bfloat16
from .utils.text_output import escape_unwritable

PACKAGES = ("torch", "torchvision", "detectron2", "fvcore", "pycocotools", "scipy", "numpy", "pillow", "safetensors")
NEEDED_GB = 1.0  # a checkpoint of a training with ResNet-50 takes 0.6 GB
TOLERANCE = 1e-5  # largest difference between the compiled operator and PyTorch's, float32 values of size 1
# A DN-Deformable-DETR that is built and trained one step in seconds.
TOY = {
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.OUT_FEATURES": ["res4", "res5"],
    "MODEL.DN_DETR.IN_FEATURES": ["res4", "res5"],
    "MODEL.DN_DETR.NUM_FEATURE_LEVELS": 2,
    "MODEL.DN_DETR.NUM_CLASSES": 3,
    "MODEL.DN_DETR.NUM_QUERIES": 5,
    "MODEL.DN_DETR.HIDDEN_DIM": 64,
    "MODEL.DN_DETR.NECK.NORM": "GN",
    "MODEL.DN_DETR.QUERY_SOURCE.CONTENT": "learned",
    "MODEL.DN_DETR.ENCODER.NAME": "DeformableEncoder",
    "MODEL.DN_DETR.DECODER.NAME": "RefiningDecoder",
    "MODEL.DN_DETR.DECODER.LAYER": "DeformableDecoderLayer",
    "MODEL.DN_DETR.DECODER.SHARE_HEADS": False,
    "MODEL.DN_DETR.ENCODER.NUM_LAYERS": 2,
    "MODEL.DN_DETR.DECODER.NUM_LAYERS": 2,
    "MODEL.DN_DETR.ENCODER.FFN_DIM": 64,
    "MODEL.DN_DETR.DECODER.FFN_DIM": 64,
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at.
        text: what was found; for something broken the reason and the way out.
        state: "ok", "note" or "BROKEN".
    """

    subject: str
    text: str
    state: str = "ok"


def versions() -> Iterator[Finding]:
    """Python, the packages that results depend on, and this one with its commit."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        try:
            yield Finding(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "has no version; it was not installed by pip", "note")
    folder = Path(__file__).resolve().parent
    commit = _commit(folder.parent)
    yield Finding("dn_detr_d2", f"{__version__}{f', commit {commit}' if commit else ''}, in {folder}")


def _commit(folder: Path) -> str:
    """Short name of the checked-out commit, "+" if files differ from it; "" outside a clone or without git."""
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return ""
    ran = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty=+"], capture_output=True, text=True
    )
    return ran.stdout.strip()


def devices() -> Iterator[Finding]:
    """Processor threads and GPUs."""
    yield Finding("cpu", f"{os.cpu_count()} cores, PyTorch uses {torch.get_num_threads()} threads")
    if reason := slow_bfloat16():
        yield Finding("cpu bfloat16", f"{reason}; leave SOLVER.AMP.ENABLED off on this CPU", "note")
    if not torch.cuda.is_available():
        why = "PyTorch was built without CUDA" if torch.version.cuda is None else "no driver or no device was found"
        yield Finding("cuda", f"no GPU: {why}; everything runs on the CPU", "note")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield Finding(f"cuda:{i}", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB")


def kernels(wanted: str = "auto") -> Iterator[Finding]:
    """Which backend of deformable attention works on which device, and why another does not.

    Args:
        wanted: ``MODEL.DN_DETR.OP_BACKEND``; a device whose kernel it asks for must have one.
    """
    for device in ("cpu", "cuda"):
        reason = missing_kernel(device)
        if not reason:
            detail = f" ({torch.ops.dn_detr_d2.cpu_capability()})" if device == "cpu" else ""
            yield Finding(f"backend {device}", f"compiled kernel{detail}")
        elif device == "cuda" and not torch.cuda.is_available():
            yield Finding(f"backend {device}", f"no kernel, and no GPU to need it: {reason}", "note")
        else:
            slower = "OP_BACKEND auto takes PyTorch's operators, several times slower"
            state = "BROKEN" if wanted == device or kernel_is_broken(device) else "note"
            yield Finding(f"backend {device}", f"no kernel ({slower}): {reason}", state)
    yield Finding("backend torch", "PyTorch's operators, on any device")


def self_tests() -> Iterator[Finding]:
    """The compiled operators against PyTorch's, and one training step of a small model, on every device."""
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        if not missing_kernel(device):
            yield _attempt(f"operator on {device}", lambda device=device: _compare_operator(device))
        yield _attempt(f"training on {device}", lambda device=device: _train_one_step(device))


def _attempt(subject: str, test: Callable[[], str]) -> Finding:
    """The finding of a check, or the error it raised: the other checks run all the same."""
    try:
        return Finding(subject, test())
    except Exception as error:
        return Finding(subject, f"{type(error).__name__}: {' '.join(str(error).split())}", "BROKEN")


def _compare_operator(device: str) -> str:
    """Largest difference of outputs and gradients between the kernel and PyTorch's operators; raises if too large."""
    shapes, generator = [(5, 7), (3, 4)], torch.Generator().manual_seed(0)
    sizes = (2, 47, 4, 8), (2, 6, 4, 2, 3, 2), (2, 6, 4, 2, 3)  # value, locations, weights
    inputs = [torch.rand(size, generator=generator).to(device) for size in sizes]
    results = []
    for backend in (device, "torch"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = ms_deform_attn(leaves[0], shapes, *leaves[1:], backend)
        results.append([output.detach(), *torch.autograd.grad(output.square().mean(), leaves)])
    worst = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
    if not worst <= TOLERANCE:  # also not a number
        raise ArithmeticError(
            f"the kernel is {worst:.1e} off PyTorch's operators, {TOLERANCE} is allowed; build it anew"
        )
    return f"output and gradients equal PyTorch's to {worst:.1e}"


def _train_one_step(device: str) -> str:
    """Sum of the losses of a small model; raises if it, or a gradient, is missing or not finite."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        overrides = chain.from_iterable((TOY | {"MODEL.DEVICE": device}).items())
        model = build_model(setup_cfg("", list(overrides), splits=())).train()
        boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 48.0], [20.0, 4.0, 60.0, 30.0]]))
        target = Instances((64, 64), gt_boxes=boxes, gt_classes=torch.tensor([0, 2]))
        image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
        loss = sum(model([{"image": image, "instances": target}]).values())
        loss.backward()
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    bad = [name for name, p in parameters if p.grad is None or not bool(p.grad.isfinite().all())]
    if bad or not bool(loss.isfinite()):
        raise ArithmeticError(
            f"loss {float(loss.detach())}, gradients missing or not finite: {', '.join(bad[:4]) or 'none'}"
        )
    return f"loss {float(loss.detach()):.2f}, gradients of {len(parameters)} tensors are finite"


def places(output_dir: str) -> Iterator[Finding]:
    """Disk space where trainings and the embedded data set are written, memory, and where data sets are looked for."""
    for name, folder in (("output folder", Path(output_dir)), ("cache folder", cache_folder())):
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(there).free / 2**30
        text = f"{folder.absolute()}, {free:.1f} GiB free"
        if not there.is_dir() or not os.access(there, os.W_OK):
            yield Finding(name, f"{text}, but {there} cannot be written; choose another folder", "BROKEN")
        elif free < NEEDED_GB:
            yield Finding(name, f"{text}, a training needs at least {NEEDED_GB}; make room", "BROKEN")
        else:
            yield Finding(name, text)
    yield Finding("memory", _memory())
    root, told = dataset_path(""), os.environ.get("DETECTRON2_DATASETS")
    text = f"DETECTRON2_DATASETS = {told or 'not set'}, so data sets lie below {root.absolute()}"
    if root.is_dir():
        yield Finding("data sets", f"{text}; it holds {', '.join(sorted(os.listdir(root))[:8]) or 'nothing'}")
    else:
        yield Finding("data sets", f"{text}, which does not exist", "BROKEN" if told else "note")


def _memory() -> str:
    """Memory of the machine and, on Linux, how much is available."""
    if not hasattr(os, "sysconf"):  # Windows
        return "unknown on this system"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.exists() else []
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return f"{total:.1f} GiB" + ("" if kilobytes is None else f", {kilobytes / 2**20:.1f} GiB available")


def configuration(config_file: str, opts: list[str]) -> Iterator[Finding]:
    """Whether a config loads, and its data sets and weights are there."""
    try:
        cfg = setup_cfg(config_file, opts, splits=())
    except UserError as error:
        yield Finding("config", str(error), "BROKEN")
        return
    yield Finding("config", f"{config_file or 'defaults'} with {len(opts) // 2} overrides, device {cfg.MODEL.DEVICE}")
    if cfg.DATASETS.TRAIN or cfg.DATASETS.TEST or cfg.MODEL.DN_DETR.NUM_CLASSES is not None:
        yield _judge("classes", lambda: _classes(setup_cfg(config_file, opts)))
    else:
        yield Finding("classes", "not known: neither MODEL.DN_DETR.NUM_CLASSES nor a data set of DATASETS is given")
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        yield _judge(f"data set {name}", lambda name=name: _data_set(name, cfg))
    yield _judge("weights", lambda: _weights(cfg.MODEL.WEIGHTS))


def _loadable(config_file: str, opts: list[str]) -> CfgNode:
    """The config, or the default one if it does not load, which gets its own line."""
    try:
        return setup_cfg(config_file, opts, splits=())
    except UserError:
        return setup_cfg(splits=())


def _judge(subject: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, look())
    except UserError as error:
        return Finding(subject, str(error), "BROKEN")


def _classes(cfg: CfgNode) -> str:
    names = list(cfg.MODEL.DN_DETR.CLASS_NAMES)
    return f"{cfg.MODEL.DN_DETR.NUM_CLASSES} ({', '.join(names[:5]) or 'without names'}{', ...' * (len(names) > 5)})"


def _data_set(name: str, cfg: CfgNode) -> str:
    register_data_sets(cfg, [name])
    class_names(name)  # is it known at all
    check_records(name)
    files = MetadataCatalog.get(name)
    where = files.get("panoptic_json") or files.get("json_file") or files.get("sem_seg_root")
    drawn = "" if where is None or Path(where).exists() else ", drawn when it is first used"
    return f"{where or 'registered by code'}{drawn}"


def _weights(path: str) -> str:
    if path.startswith(SCHEME):
        path = str(find_packaged(path)[0])
    if not path or "://" in path:
        return f"{path} is fetched when the run begins; not looked at" if path else "none: the model starts at random"
    file = read_checkpoint(path)
    numbers = sum(x.numel() for x in file.state.values())
    names = f", {len(file.class_names)} class names" if file.class_names else ""
    source = identify(file.state)
    return f"{path}: {len(file.state)} tensors, {numbers / 1e6:.1f} M numbers{names}, of {source or 'unknown source'}"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--config-file", default="", metavar="FILE", help="also look at a config, its data and weights")
    add_overrides(parser)
    return parse(parser, argv)


def examine(cfg: CfgNode) -> list[Finding]:
    """Everything but the config itself: versions, devices, kernels, self-tests, and the places that it names."""
    kernel = kernels(cfg.MODEL.DN_DETR.OP_BACKEND)
    return [*chain(versions(), devices(), kernel, self_tests(), places(cfg.OUTPUT_DIR))]


def as_text(findings: list[Finding]) -> str:
    """A line for each finding."""
    return "\n".join(f"{finding.state:<6}  {finding.subject:<24}  {finding.text}" for finding in findings)


def main(argv: list[str] | None = None) -> int:
    """Command line; prints the report and returns the exit code."""
    args = parse_arguments(argv)
    escape_unwritable()
    findings = examine(_loadable(args.config_file, args.opts))
    if args.config_file or args.opts:
        findings += configuration(args.config_file, args.opts)
    print(as_text(findings))
    broken = sum(finding.state == "BROKEN" for finding in findings)
    print(f"{broken} of {len(findings)} lines are BROKEN" if broken else "all well")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
