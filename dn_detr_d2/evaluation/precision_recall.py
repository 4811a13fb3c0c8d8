"""Curves of precision against recall, kept beside the predictions of an evaluation.

Shapes: T IoU thresholds 0.5 to 0.95, R = 101 recalls 0 to 1, K classes.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..utils.files import atomic_write

FILE = "precision_recall_{task}.npz"


@dataclass
class PrecisionRecall:
    """Of boxes or masks of all sizes.

    Attributes:
        thresholds: (T,) IoU.
        recalls: (R,).
        classes: K names.
        precision: (T, R, K) in [0, 1]; -1 for classes without objects.
        scores: (T, R, K), the lowest score of the detections that give this recall; 0 where it is not reached.
    """

    thresholds: np.ndarray
    recalls: np.ndarray
    classes: list[str]
    precision: np.ndarray
    scores: np.ndarray

    def with_objects(self) -> list[int]:
        """Classes that have objects."""
        return np.flatnonzero((self.precision[0] >= 0).all(0)).tolist()

    def at(self, threshold: float) -> np.ndarray:
        """(R, K) precision at an IoU threshold."""
        return self.precision[np.abs(self.thresholds - threshold).argmin()]

    def mean_at(self, threshold: float) -> np.ndarray:
        """(R,) of the classes with objects, averaged."""
        return self.at(threshold)[:, self.with_objects()].mean(1)

    def mean(self) -> np.ndarray:
        """(R,) over all thresholds and classes with objects, whose mean is AP."""
        return self.precision[:, :, self.with_objects()].mean((0, 2))

    def best_score(self) -> float:
        """A score from which detections are worth showing: the median over classes of where F1 at IoU 0.5 is highest."""
        p, r = self.at(0.5)[:, self.with_objects()], self.recalls[:, None]
        f1 = 2 * p * r / np.maximum(p + r, 1e-12)
        scores = self.scores[np.abs(self.thresholds - 0.5).argmin()][:, self.with_objects()]
        return float(np.median(np.take_along_axis(scores, f1.argmax(0)[None], 0)))


def write_precision_recall(folder: str | Path, task: str, evaluation, classes: list[str]) -> None:
    """Writes ``precision_recall_<task>.npz``.

    Args:
        folder: of the predictions.
        task: "bbox" or "segm".
        evaluation: an accumulated COCOeval.
        classes: K names.
    """
    with atomic_write(Path(folder) / FILE.format(task=task)) as file:
        np.savez_compressed(
            file,
            thresholds=evaluation.params.iouThrs,
            recalls=evaluation.params.recThrs,
            classes=np.array(classes),
            precision=evaluation.eval["precision"][:, :, :, 0, -1].astype(np.float32),
            scores=evaluation.eval["scores"][:, :, :, 0, -1].astype(np.float32),
        )


def read_precision_recall(folder: str | Path, task: str) -> PrecisionRecall | None:
    """Counterpart of :func:`write_precision_recall`; None without a file, UserError for a damaged one."""
    path = Path(folder) / FILE.format(task=task)
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            names = ("thresholds", "recalls", "precision", "scores")
            return PrecisionRecall(classes=file["classes"].tolist(), **{name: file[name] for name in names})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); evaluate once more to write it anew") from None
