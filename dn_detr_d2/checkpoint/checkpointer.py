"""Writes and loads the checkpoints of a training."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

from ..coco import NUM_RAW_CLASSES, coco_names
from ..errors import CheckpointError, ConfigError
from .checksums import require_space, sum_file, write_summed
from .convert import classes_in, convert
from .download import fetch
from .reader import read_checkpoint
from .resume import find_resumable, must_fit, point_to, pointed_checkpoint, read_resumable, remove_old

logger = logging.getLogger(__name__)

BEST = "model_best"


def check_named(cfg) -> None:
    """Raises CheckpointError unless ``MODEL.WEIGHTS`` names a file that is there, or something to be fetched."""
    weights = cfg.MODEL.WEIGHTS
    way_out = "name a checkpoint of the whole model, such as output/model_final.pth"
    if not weights:
        raise CheckpointError(f"MODEL.WEIGHTS = {weights!r} would leave the model at random; {way_out}")
    path = Path(weights.split("?")[0])  # Detectron2 lets options follow
    if "://" not in weights and not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"MODEL.WEIGHTS = {weights!r} {what}; {way_out}")


def classes_of_weights(cfg, *, required: bool = True) -> list:
    """The classes of a model that is to predict, as overrides, where the config does not name them: ``MODEL.WEIGHTS``'.

    Without class names in the file it is their number; COCO's 91 raw ids stand for its 80 classes, as in a conversion. A
    number in the config holds: names are added if they are as many.

    Args:
        cfg: with MODEL.WEIGHTS.
        required: refuse weights that do not say how many classes there are where the config does not say it either;
            detectors of Detectron2 then have its own default.

    Returns:
        [key, value, ...], empty if there is nothing to add.

    Raises:
        CheckpointError: no weights are named, or they cannot be fetched or read.
        ConfigError: nothing says how many classes there are.
    """
    node, ours = cfg.MODEL.DN_DETR, cfg.MODEL.META_ARCHITECTURE == "DenoisingDETR"
    if node.NUM_CLASSES is not None and node.CLASS_NAMES:
        return []
    check_named(cfg)
    weights = cfg.MODEL.WEIGHTS
    local = weights if "://" in weights else weights.split("?")[0]
    file = read_checkpoint(fetch(local, cfg.MODEL.WEIGHTS_SHA256))
    names = list(file.class_names)
    if node.NUM_CLASSES is not None:
        return ["MODEL.DN_DETR.CLASS_NAMES", repr(names)] if len(names) == node.NUM_CLASSES else []
    number = len(names) or classes_in(file.state)
    if not number:
        if ours and required:
            raise ConfigError(
                f"MODEL.DN_DETR.NUM_CLASSES is 'auto', and {weights} does not name its classes; add "
                "MODEL.DN_DETR.NUM_CLASSES with their number, or take the config.yaml of the training"
            )
        return []
    if not names and number == NUM_RAW_CLASSES and ours:
        names = list(coco_names())
        number = len(names)
    keys = ["MODEL.DN_DETR.NUM_CLASSES", "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"]
    named = ["MODEL.DN_DETR.CLASS_NAMES", repr(names)] if names else []
    return [*(x for key in keys for x in (key, number)), *named]


def load_weights(model: nn.Module, cfg) -> None:
    """Loads all of ``MODEL.WEIGHTS`` into a model that is to predict.

    With ``MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY`` it is their moving average.

    Raises:
        CheckpointError: nothing is named, or what is named is not a file, cannot be fetched, is damaged, hostile or
            incomplete, or is of another model.
    """
    check_named(cfg)
    weights = cfg.MODEL.WEIGHTS
    averaged = cfg.MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY
    try:
        Checkpointer(model, cfg=cfg, averaged=averaged).load(weights)
    except CheckpointError as error:
        raise CheckpointError(f"MODEL.WEIGHTS = {weights!r} cannot be used: {error}") from None


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with safe reading and writing, converted names and classes that may change.

    Conversion happens when a training starts from a file and when a file is evaluated; a run that is resumed reads what it
    wrote. Saved files carry the class names and the config.

    Args:
        model, save_dir, checkpointables: as for DetectionCheckpointer.
        cfg: for the class names, ``MODEL.WEIGHTS_MATCHED`` and ``SOLVER.CHECKPOINTS_KEPT``.
        new_classes: whether classes, and other tensors as MODEL.WEIGHTS_MATCHED allows, may start at random.
        averaged: load the moving average of a file's weights instead.
        training_state: returns what else a checkpoint of a training keeps; called on every rank.

    Attributes:
        found: the checkpoint that is resumed, None if the training starts anew.
    """

    refuses_partial_weights = True  # so the model need not, as it must under Detectron2's own

    def __init__(
        self,
        model,
        save_dir: str = "",
        *,
        cfg,
        new_classes: bool = False,
        averaged: bool = False,
        training_state: Callable[[], dict] = dict,
        **checkpointables,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.training_state = training_state
        self.class_names, self.config = list(cfg.MODEL.DN_DETR.CLASS_NAMES), cfg.dump()
        self.kept = cfg.SOLVER.CHECKPOINTS_KEPT
        self.new_classes, self.least_matched = new_classes, cfg.MODEL.WEIGHTS_MATCHED
        self.averaged, self.found, self.weights_sum = averaged, None, cfg.MODEL.WEIGHTS_SHA256

    @property
    def resuming(self) -> bool:
        """Whether a checkpoint of the folder is resumed."""
        return self.found is not None

    def get_checkpoint_file(self) -> str:
        """Path of the newest checkpoint of the folder, "" if there is none; it lies in the folder, or is refused."""
        return pointed_checkpoint(self.save_dir)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """As Detectron2's, but a damaged last checkpoint is passed over, see :func:`~.folder.find_resumable`."""
        found = find_resumable(Path(self.save_dir)) if resume and self.save_dir and comm.is_main_process() else None
        found = self.found = comm.all_gather(found)[0]
        if self.resuming:
            if not sum_file(found).is_file() and comm.is_main_process():
                logger.warning(
                    "%s has no %s beside it: whether it has changed since it was written cannot be checked",
                    found,
                    sum_file(found).name,
                )
            with must_fit(found):
                return self.load(str(found))
        return super().resume_or_load(path, resume=False)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        """As fvcore's; a URL is downloaded only if the SHA-256 of its file is known, see :func:`~.download.fetch`."""
        return super().load(fetch(path, self.weights_sum) if path else path, checkpointables)

    def save(self, name: str, **kwargs) -> None:
        """Writes ``name``.pth atomically; a collective.

        Raises:
            CheckpointError: the disk is full or cannot be written to; earlier files are unchanged.
        """
        extra = {"class_names": self.class_names, "config": self.config, **self.training_state(), **kwargs}
        if not self.save_dir or not self.save_to_disk:
            return
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        content = {"model": self.model.state_dict(), **parts, **extra}
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        require_space(path, content)
        write_summed(path, lambda file: torch.save(content, file))
        self.tag_last_checkpoint(path.name)
        remove_old(path.parent, self.kept)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Names the file to resume from; the best one is none, a later one may be there."""
        if not last_filename_basename.startswith(BEST):
            point_to(Path(self.save_dir), last_filename_basename)

    def _load_file(self, filename: str) -> dict:
        if self.resuming:
            content = read_resumable(Path(filename))
            self._refuse_other_classes(list(content.get("class_names") or []))
            return content
        file = read_checkpoint(filename, averaged=self.averaged)
        return {"model": file.state, "class_names": file.class_names}

    def _refuse_other_classes(self, theirs: list[str]) -> None:
        """A training that is resumed with its classes in another order would exchange their labels."""
        if not theirs or not self.class_names or theirs == self.class_names:
            return
        rows = [i for i, pair in enumerate(zip(theirs, self.class_names, strict=False)) if len({*pair}) > 1]
        differing = f", and class {rows[0]} is another one" if rows else ""
        way_out = (
            "resume with the config.yaml beside it, whose MODEL.DN_DETR.CLASS_NAMES keeps the order"
            if set(theirs) == set(self.class_names)
            else "start anew with it as MODEL.WEIGHTS, without --resume and in another OUTPUT_DIR"
        )
        raise CheckpointError(
            f"checkpoint {str(self.found)!r} is of a training on {len(theirs)} classes, {theirs[:8]}, but DATASETS now has "
            f"{len(self.class_names)}, {self.class_names[:8]}{differing}; {way_out}"
        )

    def _load_model(self, checkpoint: dict):
        if not self.resuming:
            own = self.model.state_dict()
            names = checkpoint.pop("class_names", []), self.class_names
            conversion = convert(checkpoint["model"], own, *names, self.least_matched if self.new_classes else 1.0)
            if conversion.new_classes and not self.new_classes:
                raise CheckpointError(
                    f"the checkpoint ({conversion.source}) lacks {len(conversion.new_classes)} of the model's classes "
                    f"({', '.join(conversion.new_classes[:4])}), which only a training can add"
                )
            for sentence in conversion.log:
                logger.info(sentence)
            checkpoint["model"] = {**conversion.state, **{name: own[name] for name in conversion.absent}}
        fits = super()._load_model(checkpoint)
        if not (self.resuming or self.new_classes) and (missing := sorted({*fits.missing_keys} & own.keys())):
            shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise CheckpointError(
                f"the checkpoint does not fit the model: it looks like {conversion.source}, and {shown} are missing, which "
                "would stay at random; name a checkpoint of the whole model"
            )
        shapes = [name for name, *_ in fits.incorrect_shapes]
        if self.resuming and (wrong := sorted({*fits.missing_keys, *fits.unexpected_keys, *shapes})):
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise CheckpointError(
                f"checkpoint {str(self.found)!r} is of another model: {', '.join(wrong[:4])}{more} are missing, too many or "
                "of another shape; resume with the config.yaml beside it, or choose another OUTPUT_DIR"
            )
        return fits
