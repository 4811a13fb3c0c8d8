"""One export from a config: the model, its file, the proof that both agree, and then the file's name."""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from torch import nn

from .. import setup_cfg
from ..checkpoint.checkpointer import classes_of_weights
from ..checkpoint.download import fetch
from ..config import load_config
from ..data import DetrDatasetMapper, check_files, records_of
from ..data.mapper import has_queries
from ..engine import Trainer, load_for_evaluation
from ..errors import ConfigError, UserError
from .detector import TOLERANCES, Agreement, ExportedDetector, compare
from .formats import FORMATS, OPSETS, require_onnx
from .metadata import describe, output_names

PLAIN = ["MODEL.DEVICE", "cpu", "TEST.AMP", "", "TEST.CUDA_GRAPHS", 0]  # what is exported, and what it is compared with
NUM_IMAGES = 4  # of DATASETS.TEST that eager and exported model are compared on


class ExportError(UserError):
    """A file that does not do what its model does."""


@dataclass
class Wish:
    """What is to be exported, and how.

    Attributes:
        kind: a name of :data:`~.formats.FORMATS`.
        folder: where the file goes; made if need be.
        opset: of ONNX, None = 20.
        fp16, int8: see :func:`~.formats.write_onnx`.
        sample: an image file to compare on, "" = the first images of DATASETS.TEST.
        evaluate: whether both are evaluated on DATASETS.TEST.
    """

    kind: str
    folder: Path
    opset: int | None = None
    fp16: bool = False
    int8: bool = False
    sample: str = ""
    evaluate: bool = False

    @property
    def precision(self) -> str:
        """A name of :data:`~.detector.TOLERANCES`."""
        return "fp16" if self.fp16 else "int8" if self.int8 else "fp32"

    @property
    def path(self) -> Path:
        """The file."""
        suffix = "" if self.precision == "fp32" else f"_{self.precision}"
        return self.folder / f"model{suffix}{FORMATS[self.kind][0]}"

    def check(self) -> None:
        """Raises ConfigError for what cannot be done or would overwrite something."""
        if self.kind != "onnx" and (self.fp16 or self.int8 or self.opset is not None):
            flag = "--opset" if self.opset is not None else "--fp16" if self.fp16 else "--int8"
            raise ConfigError(f"{flag} is for --format onnx, got --format {self.kind}; leave it out")
        if self.fp16 and self.int8:
            raise ConfigError("--fp16 and --int8 exclude each other; make one file of each in two calls")
        if self.opset is not None and self.opset not in OPSETS:
            raise ConfigError(f"--opset must be {OPSETS[0]} to {OPSETS[-1]}, got {self.opset}; the default is 20")
        if self.kind == "onnx":
            require_onnx()
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"--output {self.folder} is a file; name a folder")
        if self.path.exists():
            raise ConfigError(f"{self.path} exists; remove it, or name another --output")
        if self.sample and not Path(self.sample).is_file():
            raise ConfigError(f"--sample-image {self.sample} does not exist; name an image file")


def export_model(config_file: str, opts: list, weights: str, wish: Wish) -> tuple[Path, Agreement, dict]:
    """Exports a trained detector; the file gets its name only if its detections are those of the model.

    Args:
        config_file: config.yaml of a training, or a config of the model zoo.
        opts: [key, value, ...] that override it.
        weights: a checkpoint of the whole model.
        wish: what is to be done.

    Returns:
        The path, how well file and model agree, and {"eager": results, "exported": results} of an evaluation.

    Raises:
        UserError: input that cannot be used.
        ExportError: the file does not agree with the model, and is deleted.
    """
    wish.check()
    cfg = config_of(config_file, [*opts, *PLAIN, "MODEL.WEIGHTS", weights], wish)
    model = load_for_evaluation(cfg)
    batches = sample_batches(cfg, wish.sample)
    wish.folder.mkdir(parents=True, exist_ok=True)
    draft = wish.path.with_name(f".part-{wish.path.name}")  # AOTInductor insists on the ending
    try:
        write(cfg, model, wish, draft)
        agreement, results = verify(cfg, model, wish, draft, batches)
        draft.replace(wish.path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    return wish.path, agreement, results


def config_of(config_file: str, opts: list, wish: Wish) -> CfgNode:
    """The config of an export, with its classes; those of ``NUM_CLASSES: auto`` are the checkpoint's.

    Raises:
        ConfigError: another detector than those of this package, or nothing says how many classes there are, or nothing to
            compare or to evaluate on.
    """
    plain = load_config(config_file, opts)
    if not has_queries(plain):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE = {plain.MODEL.META_ARCHITECTURE!r} is one of Detectron2's own detectors; export it "
            "with Detectron2's tools/deploy/export_model.py"
        )
    needed = wish.evaluate or not wish.sample
    if needed and not plain.DATASETS.TEST:
        flag = "--run-eval needs a data set" if wish.evaluate else "there is nothing to compare the file on"
        raise ConfigError(f"{flag}, and DATASETS.TEST is empty; name a data set, or give --sample-image FILE alone")
    return setup_cfg(config_file, [*opts, *classes_of_weights(plain)], splits=("TEST",) if needed else ())


def sample_batches(cfg: CfgNode, sample: str) -> list[list[dict]]:
    """Each image alone, and two of different size together: Detectron2's input dicts."""
    mapper = DetrDatasetMapper(cfg, False)
    if sample:
        image = mapper({"file_name": sample})
        images = [image, image | {"image": image["image"].transpose(1, 2).contiguous()}]
    else:
        name = cfg.DATASETS.TEST[0]
        check_files(name)
        images = [mapper(record) for record in records_of(name)[:NUM_IMAGES]]
    images = [{"image": x["image"], "file_name": x["file_name"]} for x in images]
    return [[x] for x in images] + [images[:2]]


def write(cfg: CfgNode, model: nn.Module, wish: Wish, path: Path) -> None:
    """Writes the file under a name for the time being; raises ExportError if the exporter fails."""
    writer: Callable[..., None] = FORMATS[wish.kind][1]
    options = {"opset": wish.opset or OPSETS[-1], "fp16": wish.fp16, "int8": wish.int8} if wish.kind == "onnx" else {}
    metadata = describe(cfg, model, Path(fetch(cfg.MODEL.WEIGHTS, cfg.MODEL.WEIGHTS_SHA256)))
    try:
        writer(model, path, metadata, **options)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError, OSError) as error:
        raise ExportError(f"the {wish.kind} exporter failed: {first_line(error)}") from error


def verify(cfg: CfgNode, model: nn.Module, wish: Wish, path: Path, batches: list[list[dict]]) -> tuple[Agreement, dict]:
    """Loads a file and compares it with its model; raises ExportError if they do not agree."""
    tolerance = TOLERANCES[wish.precision]
    try:
        exported = ExportedDetector(model, output_names(model), FORMATS[wish.kind][2](path))
        agreement = compare(model, exported, batches, tolerance)
    except Exception as error:  # whatever a runtime says of a file that it cannot run
        raise ExportError(
            f"the file was written, but it cannot be run, and was deleted: {first_line(error)}"
        ) from error
    if agreement.share < tolerance.share:
        raise ExportError(
            f"the file was written, but only {100 * agreement.share:.1f} % of the model's detections are among its own, "
            f"where {100 * tolerance.share:.0f} % are asked for, and it was deleted"
        )
    results = {}
    if wish.evaluate:
        for name, one in (("eager", model), ("exported", exported)):
            logging.getLogger(__name__).info("evaluation of the %s model", name)
            cfg.OUTPUT_DIR = str(wish.folder / f"evaluation_{name}")  # that of the training keeps what it has
            results[name] = Trainer.test(cfg, one)
    return agreement, results


def first_line(error: Exception) -> str:
    """What an error says, in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300] + (" ..." if len(text) > 300 else "")
