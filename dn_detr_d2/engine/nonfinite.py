"""Finds the first tensor that is not finite, and writes a report.

After a failure the pass is repeated under the same random numbers, and tensors are checked in the order of the computation:
weights, images and boxes, inputs and outputs of every module, loss terms, gradients. The first tensor that is not finite is
the cause, or the cause lies between the two modules around it.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from ..structures import file_name
from ..utils.files import atomic_write


@dataclasses.dataclass(frozen=True)
class NonfiniteTensor:
    """The first tensor that is not finite.

    Attributes:
        tensor: its name, such as "output of backbone.res3.1.conv2".
        statistics: see :func:`statistics`.
    """

    tensor: str
    statistics: dict

    def __str__(self) -> str:
        """One clause: which tensor holds how many NaN and Inf."""
        s = self.statistics
        return f"{self.tensor} {tuple(s['shape'])} holds {s['nan']} NaN and {s['inf']} Inf among {s['numbers']} numbers"


def statistics(x: Tensor) -> dict:
    """Shape, dtype, how many numbers are NaN and Inf, and the range of the others (None if there are none)."""
    finite = x.detach()[x.detach().isfinite()]
    low, high = ([f.item() for f in finite.aminmax()]) if len(finite) else (None, None)
    counts = {"numbers": x.numel(), "nan": int(x.isnan().sum()), "inf": int(x.isinf().sum())}
    return {"shape": list(x.shape), "dtype": str(x.dtype), **counts, "smallest": low, "largest": high}


class NonfiniteDetector:
    """Checks inputs and outputs of every module while the context is open, and keeps the first that is not finite.

    Args:
        model: with the modules.

    Attributes:
        found: the first tensor that was not finite, None if all were.
        order: name of a module -> index of its last forward pass.
    """

    def __init__(self, model: nn.Module):
        self.model, self.found, self.order, self._handles = model, None, {}, []

    def __enter__(self) -> "NonfiniteDetector":
        for name, module in self.model.named_modules():
            if name:  # search() checks inputs and outputs of the whole model
                self._handles.append(module.register_forward_pre_hook(partial(self._before_forward, name)))
                self._handles.append(module.register_forward_hook(partial(self._after_forward, name)))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def last_pass(self, parameter: str) -> int:
        """Index of the last forward pass of the module with this parameter, or of the nearest one around it that ran."""
        name = parameter
        while name and name not in self.order:
            name = name.rpartition(".")[0]
        return self.order.get(name, -1)

    def _before_forward(self, name: str, module: nn.Module, given: tuple) -> None:
        self._check(f"input of {name}", given)

    def _after_forward(self, name: str, module: nn.Module, given: tuple, output) -> None:
        self.order[name] = len(self.order)
        self._check(f"output of {name}", output)

    def _check(self, name: str, content) -> None:
        if self.found is None:
            self.found = first_nonfinite((name, x) for x in tensors(content))


def search(
    model: nn.Module,
    parts: list[tuple],
    losses_of: Callable[[tuple], dict[str, Tensor]],
    with_gradients: bool,
) -> tuple[NonfiniteTensor | None, tuple, bool]:
    """The first tensor that is not finite. A collective: the passes all-reduce.

    Args:
        model: out of DistributedDataParallel.
        parts: of the batch, as for the forward passes; images are the first entry of each.
        losses_of: one forward pass of ``model``; may raise FloatingPointError.
        with_gradients: whether to check gradients too, where the forward passes are finite.

    Returns:
        tuple: the tensor, None if all are finite this time; the part of the batch that it belongs to, or whose pass has
        raised FloatingPointError again; and whether there is such a tensor or part.
    """
    state, failing = [*model.named_parameters(), *model.named_buffers()], []
    found = [(first_nonfinite((f"weight {name}", x) for name, x in state), parts[0])]
    for part in parts:
        found.append((first_nonfinite(_inputs(part[0])), part))
        with NonfiniteDetector(model) as detector, torch.set_grad_enabled(with_gradients):
            try:
                losses = losses_of(part)
            except FloatingPointError:  # where it is the matcher's, the detector knows more
                losses = {}
                failing.append(part)
        found.append((detector.found, part))
        found.append((first_nonfinite((f"loss term {name}", x) for name, x in losses.items()), part))
        if with_gradients and losses:
            found.append((_nonfinite_gradient(model, sum(losses.values()), detector), part))
    nothing = None, (failing or parts)[0], bool(failing)
    return next(((finding, part, True) for finding, part in found if finding is not None), nothing)


def _inputs(batch: list[dict]) -> Iterator[tuple[str, Tensor]]:
    for image in batch:
        name = file_name(image)
        yield f"image {name}", image["image"]
        if hasattr(image.get("instances"), "gt_boxes"):
            yield f"boxes of {name}", image["instances"].gt_boxes.tensor


def _nonfinite_gradient(model: nn.Module, loss: Tensor, detector: NonfiniteDetector) -> NonfiniteTensor | None:
    """The first gradient that is not finite in the order of the backward pass, from the loss to the image."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    named.sort(key=lambda pair: -detector.last_pass(pair[0]))
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    pairs = zip(named, gradients, strict=True)
    return first_nonfinite((f"gradient of {name}", g) for (name, _), g in pairs if g is not None)


def first_nonfinite(named: Iterator[tuple[str, Tensor]]) -> NonfiniteTensor | None:
    """The first of (name, tensor) pairs that is not finite."""
    for name, x in named:
        if x.is_floating_point() and not x.isfinite().all():
            return NonfiniteTensor(name, statistics(x))
    return None


def tensors(content) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples, dicts and dataclasses."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, list | tuple | dict):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors(part)
    elif dataclasses.is_dataclass(content):
        for field in dataclasses.fields(content):
            yield from tensors(getattr(content, field.name))


def write_report(path: Path, batch: list[dict], random_state: dict[str, Tensor], content: dict) -> None:
    """Writes ``path``.json with ``content`` and the versions, and ``path``.pth with what it takes to repeat the pass.

    Args:
        path: without suffix.
        batch: of this process.
        random_state: of PyTorch when the pass began.
        content: what JSON can hold; numbers that are not finite are written as text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = [{key: _plain(value) for key, value in image.items()} for image in batch]
    with atomic_write(path.with_suffix(".pth")) as file:
        torch.save({"batch": plain, "random_state": random_state}, file)
    versions = {"python_packages": {name: metadata.version(name) for name in ("torch", "detectron2")}}
    versions["cuda"] = torch.version.cuda
    text = json.dumps(_as_text({**content, "batch": path.with_suffix(".pth").name, "versions": versions}), indent=2)
    with atomic_write(path.with_suffix(".json"), "w") as file:
        file.write(f"{text}\n")


def _as_text(content):
    """NaN and infinities as text, which JSON does not have as numbers."""
    if isinstance(content, dict):
        return {key: _as_text(value) for key, value in content.items()}
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def _plain(value):
    """Instances as a dict of tensors, so that the dump loads with ``weights_only=True``."""
    if hasattr(value, "get_fields"):
        fields = {k: getattr(v, "tensor", v) for k, v in value.get_fields().items()}
        return {"image_size": tuple(value.image_size), **fields}
    return value
