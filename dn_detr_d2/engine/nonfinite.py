"""Where a number that is not finite came from, and the report of it.

After a failure the pass is repeated under the same random numbers and looked at in the order of the computation: images and
boxes, weights, what enters and leaves every module, loss terms, gradients. The first bad tensor is the cause, or the place
between two modules where the cause is.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from ..utils.files import atomic_write


@dataclasses.dataclass(frozen=True)
class Finding:
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


class Watch:
    """While it is open, looks at what enters and leaves every module and keeps the first that is not finite.

    Args:
        model: whose modules.
    """

    def __init__(self, model: nn.Module):
        self.model, self.found, self.order, self._handles = model, None, {}, []

    def __enter__(self) -> "Watch":
        for name, module in self.model.named_modules():
            if name:  # what enters and leaves the whole model is looked at by search()
                self._handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
                self._handles.append(module.register_forward_hook(partial(self._leave, name)))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def last_pass(self, parameter: str) -> int:
        """When the module that has the parameter, or the nearest one around it that was called, was last left."""
        name = parameter
        while name and name not in self.order:
            name = name.rpartition(".")[0]
        return self.order.get(name, -1)

    def _enter(self, name: str, module: nn.Module, given: tuple) -> None:
        self._look(f"input of {name}", given)

    def _leave(self, name: str, module: nn.Module, given: tuple, output) -> None:
        self.order[name] = len(self.order)
        self._look(f"output of {name}", output)

    def _look(self, name: str, content) -> None:
        if self.found is None:
            self.found = first_bad((name, x) for x in tensors(content))


def search(
    model: nn.Module,
    parts: list[tuple],
    losses_of: Callable[[tuple], dict[str, Tensor]],
    with_gradients: bool,
) -> tuple[Finding | None, tuple]:
    """Looks for the first tensor that is not finite; all ranks must search together, because the passes talk.

    Args:
        model: not wrapped for several processes.
        parts: the batch, in the parts that pass one by one; images are the first entry of each.
        losses_of: one pass through ``model``; may raise FloatingPointError.
        with_gradients: whether to differentiate as well, where the passes alone are finite.

    Returns:
        tuple: the finding, None where all is finite this time, and the part of the batch it belongs to.
    """
    state = [*model.named_parameters(), *model.named_buffers()]
    found = [(first_bad((f"weight {name}", x) for name, x in state), parts[0])]
    for part in parts:
        found.append((first_bad(_inputs(part[0])), part))
        with Watch(model) as watch, torch.set_grad_enabled(with_gradients):
            losses = {}
            with contextlib.suppress(FloatingPointError):  # of the matcher; the watch knows better
                losses = losses_of(part)
        found.append((watch.found, part))
        found.append((first_bad((f"loss term {name}", x) for name, x in losses.items()), part))
        if with_gradients and losses:
            found.append((_bad_gradient(model, sum(losses.values()), watch), part))
    return next(((finding, part) for finding, part in found if finding is not None), (None, parts[0]))


def _inputs(batch: list[dict]) -> Iterator[tuple[str, Tensor]]:
    for image in batch:
        name = file_name(image)
        yield f"image {name}", image["image"]
        if hasattr(image.get("instances"), "gt_boxes"):
            yield f"boxes of {name}", image["instances"].gt_boxes.tensor


def _bad_gradient(model: nn.Module, loss: Tensor, watch: Watch) -> Finding | None:
    """Gradients flow from the loss to the image: of the bad ones the first belongs to the module that was left last."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    named.sort(key=lambda pair: -watch.last_pass(pair[0]))
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    pairs = zip(named, gradients, strict=True)
    return first_bad((f"gradient of {name}", g) for (name, _), g in pairs if g is not None)


def first_bad(named: Iterator[tuple[str, Tensor]]) -> Finding | None:
    """The first of (name, tensor) pairs that is not finite."""
    for name, x in named:
        if x.is_floating_point() and not x.isfinite().all():
            return Finding(name, statistics(x))
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


def file_name(image: dict) -> str:
    """Name of an image of a batch."""
    return image.get("file_name", "unnamed")


def _as_text(content):
    """Numbers that JSON does not have as text."""
    if isinstance(content, dict):
        return {key: _as_text(value) for key, value in content.items()}
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def _plain(value):
    """Instances as a dict of tensors, so that the dump loads with ``weights_only=True``."""
    if hasattr(value, "get_fields"):
        fields = {k: getattr(v, "tensor", v) for k, v in value.get_fields().items()}
        return {"image_size": tuple(value.image_size), **fields}
    return value
