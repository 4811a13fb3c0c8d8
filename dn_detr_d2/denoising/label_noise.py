"""Kinds of label noise by name: functions of labels, of the chance gamma and of the number of classes P.

A noise takes (...) int64 labels in [0, P) and gives new ones; "unknown", the index P, is never drawn. All draw from
PyTorch's global generator.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError
from .noise import distribution, flip_labels, redraw_labels
from .noise_registry import NoiseRegistry

LabelNoise = Callable[[Tensor, float, int], Tensor]
LABEL_NOISES = NoiseRegistry("label_noise", "MODEL.DN_DETR.DENOISING.LABEL_NOISE.NAME")
LABEL_NOISES.register("uniform")(flip_labels)


@LABEL_NOISES.register("class_frequency")
class ClassFrequency:
    """Redraws a label with probability gamma; the new one is class c with the probability f_c = counts[c] / sum of counts.

    It may be the old one, so an object of class c changes its label with probability gamma (1 - f_c).

    Args:
        counts: objects of each class, not negative, not all 0.

    Raises:
        ValueError: no such counts.
    """

    def __init__(self, counts: Sequence[float] = ()):
        if not _are_weights(counts) or sum(counts) == 0:
            raise ValueError(
                "label noise by class frequency needs the number of objects of each class, not negative and not all 0, got "
                f"{counts!r:.100}"
            )
        self._below = distribution(torch.tensor(counts, dtype=torch.float64))

    @classmethod
    def from_config(cls, cfg) -> LabelNoise:
        """From ``DENOISING.LABEL_NOISE.CLASS_COUNTS``; without them, a function that says so when labels are noised."""
        key, counts = "MODEL.DN_DETR.DENOISING.LABEL_NOISE.CLASS_COUNTS", _node(cfg).CLASS_COUNTS
        if not counts:
            return _refusal(f"{key} is empty; setup_cfg() fills it in from DATASETS.TRAIN for a training")
        _check_number(len(counts), cfg.MODEL.DN_DETR.NUM_CLASSES, key)
        return cls(counts)

    def __call__(self, labels: Tensor, prob: float, num_classes: int) -> Tensor:
        """Noised labels."""
        _check_number(len(self._below), num_classes, "the list of class counts")
        return redraw_labels(labels, prob, _on(labels.device, self._below))


@LABEL_NOISES.register("confusion")
class Confusion:
    """With probability gamma a label becomes another class, as often as a detector takes its class for that one.

    The diagonal of the confusion matrix is left out, so a label changes with probability gamma, and an object of class c
    becomes class d with probability gamma n[c, d] / (sum of n[c, e] over e != c). A class that is never taken for another
    one becomes each of the others equally often.

    Args:
        matrix: (P, P) counts n, rows are true classes, columns predicted ones; not negative; P >= 2.

    Raises:
        ValueError: no such matrix.
    """

    def __init__(self, matrix: Sequence[Sequence[float]] = ()):
        if len(matrix) < 2 or not all(_are_weights(row) and len(row) == len(matrix) for row in matrix):
            raise ValueError(
                "label noise by confusion needs a square matrix of at least two classes, not negative, got "
                f"{matrix!r:.100}"
            )
        counts = torch.tensor(matrix, dtype=torch.float64).fill_diagonal_(0)
        others = 1 - torch.eye(len(matrix), dtype=torch.float64)
        self._below = distribution(torch.where(counts.sum(1, keepdim=True) > 0, counts, others))

    @classmethod
    def from_file(cls, path: str, class_names: Sequence[str], num_classes: int) -> "Confusion":
        """From a ``confusion_matrix.json`` of an evaluation, in the order of the model's classes.

        Args:
            path: of a JSON object with ``matrix`` and, where the classes have names, ``classes``.
            class_names: of the model; [] if unknown, then the file must have ``num_classes`` in the model's order.
            num_classes: of the model. A class that the file lacks is one that is never confused.

        Raises:
            ConfigError: the file cannot be read, has another form, or has classes that the model has not.
        """
        try:
            content = json.loads(Path(path).read_bytes())
            rows, names = content["matrix"], content.get("classes")
            cls(rows)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ConfigError(f"{path} holds no confusion matrix ({why}); take that of an evaluation") from None
        if not names or not class_names:
            _check_number(len(rows), num_classes, path)
            return cls(rows)
        unknown = [name for name in names if name not in class_names]
        if unknown or len(set(names)) != len(rows):
            raise ConfigError(
                f"{path} has the classes {list(names)[:8]!r:.200}, and the model {list(class_names)[:8]!r:.200}; take the "
                "confusion_matrix.json of an evaluation on the same classes"
            )
        place = {name: i for i, name in enumerate(names)}
        order = [place.get(name) for name in class_names]
        return cls([[0 if None in (i, j) else rows[i][j] for j in order] for i in order])

    @classmethod
    def from_config(cls, cfg) -> LabelNoise:
        """From the file ``DENOISING.LABEL_NOISE.CONFUSION_MATRIX``; without it, a function that refuses to noise labels."""
        path, node = _node(cfg).CONFUSION_MATRIX, cfg.MODEL.DN_DETR
        if not Path(path).is_file():
            return _refusal(f"MODEL.DN_DETR.DENOISING.LABEL_NOISE.CONFUSION_MATRIX = {path!r} is no file")
        return cls.from_file(path, node.CLASS_NAMES, node.NUM_CLASSES)

    def __call__(self, labels: Tensor, prob: float, num_classes: int) -> Tensor:
        """Noised labels."""
        _check_number(len(self._below), num_classes, "the confusion matrix")
        return redraw_labels(labels, prob, _on(labels.device, self._below)[labels])


def _on(device: torch.device, table: Tensor) -> Tensor:
    """A table of float64 on a device; Apple's GPUs have float32 alone."""
    return table.to(device, torch.float32 if device.type == "mps" else None)


def _node(cfg):
    return cfg.MODEL.DN_DETR.DENOISING.LABEL_NOISE


def _are_weights(values) -> bool:
    numbers = isinstance(values, list | tuple) and all(type(x) in (int, float) for x in values)
    return numbers and all(0 <= x < math.inf for x in values)


def _check_number(found: int, num_classes: int, what: str) -> None:
    if found != num_classes:
        raise ConfigError(f"{what} has {found} classes, and the model {num_classes}; take one of the same classes")


def _refusal(reason: str) -> LabelNoise:
    """Noise of a model that is not trained: what it is drawn by need not be at hand."""

    def refuse(labels: Tensor, prob: float, num_classes: int) -> Tensor:
        """Raises the reason when labels are to be noised."""
        raise ConfigError(reason)

    return refuse
