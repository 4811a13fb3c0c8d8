"""Checkpoints of a training: what is in them, which one is taken up, which are kept."""

import logging
from collections.abc import Callable

import torch
from detectron2.checkpoint import DetectionCheckpointer

from ..checkpoint import convert, read_checkpoint
from ..errors import CheckpointError

logger = logging.getLogger(__name__)

BEST = "model_best"


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with safe reading, converted names and classes that may change.

    Conversion happens when a training starts from a file and when a file is evaluated; a run that is resumed reads what it
    wrote. Saved files carry the class names and the config.

    Args:
        model, save_dir, checkpointables: as for DetectionCheckpointer.
        cfg: for the class names.
        new_classes: whether classes that the file lacks may start at random.
        progress: gives what else a checkpoint of a training keeps; called on every rank.
    """

    def __init__(
        self,
        model,
        save_dir: str = "",
        *,
        cfg,
        new_classes: bool = False,
        progress: Callable[[], dict] = dict,
        **checkpointables,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.progress = progress
        self.class_names, self.config = list(cfg.MODEL.DN_DETR.CLASS_NAMES), cfg.dump()
        self.new_classes, self.resuming = new_classes, False

    def resume_or_load(self, path: str, *, resume: bool = True):
        """As Detectron2's."""
        self.resuming = resume and self.has_checkpoint()
        return super().resume_or_load(path, resume=resume)

    def save(self, name: str, **kwargs) -> None:
        """Writes ``name``.pth; every rank must call."""
        super().save(name, class_names=self.class_names, config=self.config, **self.progress(), **kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Names the file to resume from; the best one is none, a later one may be there."""
        if last_filename_basename != f"{BEST}.pth":
            super().tag_last_checkpoint(last_filename_basename)

    def _load_file(self, filename: str) -> dict:
        if self.resuming:
            try:
                return torch.load(filename, map_location="cpu", weights_only=True)
            except Exception as error:
                first = (str(error).strip().splitlines() or [repr(error)])[0]
                raise CheckpointError(
                    f"the checkpoint to resume from, {filename}, is damaged ({first}); write the name of an earlier "
                    "model_*.pth into the file last_checkpoint beside it"
                ) from None
        file = read_checkpoint(filename)
        return {"model": file.state, "class_names": file.class_names}

    def _load_model(self, checkpoint: dict):
        if not self.resuming:
            own = self.model.state_dict()
            conversion = convert(checkpoint["model"], own, checkpoint.pop("class_names", []), self.class_names)
            if conversion.new_classes and not self.new_classes:
                raise CheckpointError(
                    f"the checkpoint ({conversion.source}) lacks {len(conversion.new_classes)} of the model's classes "
                    f"({', '.join(conversion.new_classes[:4])}), which only a training can add"
                )
            for sentence in conversion.log:
                logger.info(sentence)
            checkpoint["model"] = conversion.state
        return super()._load_model(checkpoint)
