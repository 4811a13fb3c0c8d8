"""The diagnostics as hooks of a training: scalars for TensorBoard and metrics.json, and a check before the first step."""

import logging
import math
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from detectron2.engine import HookBase
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm

from ..data import build_annotated_batch
from ..data.loader import load_annotated, probe_records
from ..errors import CheckpointError, ConfigError
from ..utils.files import atomic_write
from ..utils.rng import isolated_rng
from .denoising_health import Restoration, measure_restoration
from .instability import anchor_metrics, churn, instability
from .leak import check_denoising
from .model_state import require_queries
from .probe import ProbedImage, probe
from .validation_loss import validation_losses

logger = logging.getLogger(__name__)


def check_diagnostics(cfg) -> None:
    """Raises ConfigError if the diagnostics of :func:`build_diagnostics` cannot work with the rest of the config."""
    node = cfg.TEST.INSTABILITY
    if cfg.DEBUG.CHECK_DENOISING or node.NUM_IMAGES or cfg.TEST.VALIDATION_LOSS:
        require_queries(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE))
    tested = {"TEST.INSTABILITY.NUM_IMAGES": node.NUM_IMAGES, "TEST.VALIDATION_LOSS": cfg.TEST.VALIDATION_LOSS}
    for key, count in tested.items():
        if count and not cfg.DATASETS.TEST:
            raise ConfigError(
                f"{key} = {count} measures on DATASETS.TEST, which is empty; name a data set or set it to 0"
            )
    if node.NUM_IMAGES and node.HEALTH_SCALES and not cfg.MODEL.DN_DETR.DENOISING.NAME:
        raise ConfigError(
            f"TEST.INSTABILITY.HEALTH_SCALES = {list(node.HEALTH_SCALES)} measures denoising queries, but "
            "MODEL.DN_DETR.DENOISING.NAME is ''; set it to []"
        )


def build_diagnostics(cfg) -> list[HookBase]:
    """The hooks that ``TEST.INSTABILITY``, ``TEST.VALIDATION_LOSS`` and ``DEBUG.CHECK_DENOISING`` ask for, for every rank.

    Raises:
        ConfigError: see :func:`check_diagnostics`.
        DatasetError: the chosen images have no boxes.
    """
    check_diagnostics(cfg)
    hooks, node = [], cfg.TEST.INSTABILITY
    if cfg.DEBUG.CHECK_DENOISING:
        with isolated_rng(0):  # Detectron2's resize draws even where there is one size
            hooks.append(LeakCheckHook(build_annotated_batch(cfg, cfg.DATASETS.TRAIN[0], 2)))
    if node.NUM_IMAGES:
        records = probe_records(cfg, cfg.DATASETS.TEST[0], node.NUM_IMAGES)
        hooks.append(
            InstabilityHook(
                load_annotated(cfg, records),
                [str(record["image_id"]) for record in records],
                Path(cfg.OUTPUT_DIR) / "instability.npz",
                period=node.PERIOD or cfg.TEST.EVAL_PERIOD,
                top_k=node.ATD_K,
                scales=node.HEALTH_SCALES,
            )
        )
    if cfg.TEST.VALIDATION_LOSS:
        hooks.append(ValidationLossHook(_validation_sets(cfg), cfg.TEST.EVAL_PERIOD))
    return hooks


def _validation_sets(cfg) -> dict[str, Iterable[list[dict]]]:
    """Prefix of the names of the losses -> loader, of every data set of ``DATASETS.TEST``."""
    sets, count = cfg.DATASETS.TEST, cfg.TEST.VALIDATION_LOSS
    prefixes = ["validation/"] if len(sets) == 1 else [f"{name}/validation/" for name in sets]
    loaders = [load_annotated(cfg, probe_records(cfg, name, count)) for name in sets]
    return dict(zip(prefixes, loaders, strict=True))


class LeakCheckHook(HookBase):
    """Refuses to train a model whose denoising queries can be seen, see :func:`~.leak.check_denoising`.

    Args:
        batch: annotated images.
    """

    def __init__(self, batch: list[dict]):
        self.batch = batch

    def before_train(self) -> None:
        """Raises LeakError on every rank alike."""
        check_denoising(self.trainer.model, self.batch)


class MeasuringHook(HookBase):
    """Base of what is measured now and then, and once more when the training is over.

    Args:
        period: iterations between two measurements; 0 or less = only at the end.
    """

    def __init__(self, period: int):
        self.period = max(period, 0)

    def after_step(self) -> None:
        """Measures if it is time; the last time is left to :meth:`after_train`."""
        done = self.trainer.iter + 1
        if done != self.trainer.max_iter and self.period and done % self.period == 0:
            self.measure(done)

    def after_train(self) -> None:
        """Measures at the end of a training that went through."""
        if self.trainer.iter >= self.trainer.max_iter:
            self.measure(self.trainer.iter)

    def measure(self, done: int) -> None:
        """Measures after so many iterations and logs it; called on every rank."""
        raise NotImplementedError


class ValidationLossHook(MeasuringHook):
    """Logs the losses on images that are not trained on, see :func:`~.validation_loss.validation_losses`.

    Args:
        loaders: what their names begin with -> annotated images.
        period: as for :class:`MeasuringHook`.
    """

    def __init__(self, loaders: dict[str, Iterable[list[dict]]], period: int):
        super().__init__(period)
        self.loaders = loaders

    def measure(self, done: int) -> None:
        """Logs ``validation/total_loss`` and every term."""
        for prefix, loader in self.loaders.items():
            losses = validation_losses(self.trainer.model, loader)
            if comm.is_main_process():
                scalars = {f"{prefix}{name}": value for name, value in losses.items()}
                self.trainer.storage.put_scalars(**scalars, smoothing_hint=False)
        comm.synchronize()


class InstabilityHook(MeasuringHook):
    """Probes the model now and then, and once more when the training is over.

    The last assignment is kept in a file, so that a training that is resumed goes on with its curve. A probe that is not
    ``period`` iterations after the one before, as the last of a training may be, has no instability: its value grows with
    that distance.

    Args:
        loader: annotated images, the same in every probe.
        image_ids: of all ranks.
        record: the file, ``.npz``.
        period: as for :class:`MeasuringHook`.
        top_k: k of ATD(k).
        scales: of box noise for :func:`~.denoising_health.measure_restoration`; none = not measured.
    """

    def __init__(
        self,
        loader: Iterable[list[dict]],
        image_ids: Iterable[str],
        record: Path,
        *,
        period: int,
        top_k: int,
        scales: Iterable[float] = (),
    ):
        super().__init__(period)
        self.loader, self.image_ids, self.record = loader, set(image_ids), record
        self.top_k, self.scales = top_k, list(scales)
        self.previous, self.previous_iteration = None, 0

    def before_train(self) -> None:
        """Takes up the last assignment of the training that is resumed; raises ConfigError if it is of other images."""
        start = self.trainer.start_iter
        if start == 0 or not comm.is_main_process() or not self.record.is_file():
            return
        iteration, assignment = read_assignment(self.record)
        if iteration > start:
            logger.warning(
                "%s is of iteration %d, after the checkpoint of iteration %d; the curve of the instability starts anew",
                self.record,
                iteration,
                start,
            )
        elif assignment.keys() != self.image_ids:
            raise ConfigError(
                f"{self.record} is of {len(assignment)} other images than the {len(self.image_ids)} that "
                "TEST.INSTABILITY.NUM_IMAGES and DATASETS.TEST choose; set them as before, or delete the file to begin a "
                "new curve"
            )
        else:
            self.previous, self.previous_iteration = assignment, iteration

    def measure(self, done: int) -> None:
        """Logs instability, anchors and the restoring of noised objects."""
        images = probe(self.trainer.model, self.loader)
        health = measure_restoration(self.trainer.model, self.loader, self.scales) if self.scales else {}
        if comm.is_main_process():
            assignment = {image.image_id: image.matched for image in images}
            self._require_same_shape(assignment)
            scalars = describe(images, self._comparable(done), self.top_k) | describe_health(health)
            self.trainer.storage.put_scalars(**scalars, smoothing_hint=False)
            write_assignment(self.record, done, assignment)
            self.previous, self.previous_iteration = assignment, done
        comm.synchronize()

    def _comparable(self, done: int) -> dict[str, np.ndarray] | None:
        """The last assignment, if it is one period old."""
        step = done - self.previous_iteration
        if self.previous is None or self.period in (0, step):
            return self.previous
        logger.info(
            "no instability after %d iterations: the last probe was %d iterations before, and the others of the curve are "
            "%d apart",
            done,
            step,
            self.period,
        )
        return None

    def _require_same_shape(self, assignment: dict[str, np.ndarray]) -> None:
        """Raises ConfigError if the last assignment is of a model with other layers or queries."""
        before, now = (next(iter(x.values())).shape for x in (self.previous or assignment, assignment))
        if before != now:
            raise ConfigError(
                f"{self.record} is of a model with {before} decoder layers and queries, and this one has {now}; set "
                "MODEL.DN_DETR.NUM_QUERIES and DECODER.NUM_LAYERS as before, or delete the file to begin a new curve"
            )


def describe(images: list[ProbedImage], previous: dict[str, np.ndarray] | None, top_k: int) -> dict[str, float]:
    """Scalars of one probe: ``instability/layer_i`` (from the second probe on), ``instability/churn_i``, ``anchors/*``."""
    scalars = {f"anchors/{name}": value for name, value in anchor_metrics(images, top_k).items()}
    scalars |= {f"instability/churn_{i}": value for i, value in enumerate(churn(images).tolist(), 1)}
    if previous is not None:
        changed = instability(previous, {image.image_id: image.matched for image in images})
        scalars |= {f"instability/layer_{i}": value for i, value in enumerate(changed.tolist())}
    return scalars


def describe_health(health: dict[float, Restoration]) -> dict[str, float]:
    """Scalars of the last layer, ``denoising/accuracy@scale`` and ``denoising/iou@scale``; of the first with ``first_``.

    Models without boxes have no IoU.
    """
    scalars = {}
    for scale, found in health.items():
        for prefix, layer in (("", -1), ("first_", 0)):
            scalars[f"denoising/{prefix}accuracy@{scale:g}"] = float(found.accuracy[layer])
            scalars[f"denoising/{prefix}iou@{scale:g}"] = float(found.iou[layer])
        scalars[f"denoising/start_iou@{scale:g}"] = found.start_iou
    return {name: value for name, value in scalars.items() if not math.isnan(value)}


def write_assignment(path: Path, iteration: int, assignment: dict[str, np.ndarray]) -> None:
    """Writes {image id: (K, Q)} and the iterations done; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = sorted(assignment)
    with atomic_write(path) as file:
        np.savez_compressed(
            file, iteration=iteration, image_ids=np.array(ids), matched=np.stack([assignment[i] for i in ids])
        )


def read_assignment(path: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Counterpart of :func:`write_assignment`; raises CheckpointError if the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            ids = file["image_ids"].tolist()
            return int(file["iteration"]), dict(zip(ids, file["matched"], strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); delete it, then the curve of the instability starts anew"
        ) from None
