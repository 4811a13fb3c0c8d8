"""The losses of the training on annotated images that are not trained on."""

import zlib
from collections.abc import Iterable

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from ..losses import LossNormalizers, LossValue, StepNormalizers
from ..modeling.batch import count_objects
from ..modeling.outputs import ForwardOutputs
from ..utils.rng import seed_all
from .model_state import gather, preserve_state, require_queries
from .probe import require_objects


def validation_losses(model: nn.Module, loader: Iterable[list[dict]], seed: int = 0) -> dict[str, float]:
    """Every loss term over all images as over one large batch; in evaluation mode, so without dropout.

    Terms are summed over the images of all ranks and divided by the number of objects, denoising terms by the number of
    noised ones; means over queries (:class:`~dn_detr_d2.losses.ClassSoftmax`) by the number of images.
    So neither the order of the images nor the number of processes matters.

    Args:
        model: a :class:`~dn_detr_d2.modeling.DenoisingDETR`, in any mode, with or without DistributedDataParallel; it keeps
            its mode, and the random streams go on from where they stood.
        loader: annotated images, one a batch, each on one rank; see :func:`dn_detr_d2.data.build_probe_loader`.
        seed: of the denoising; each image has its own stream.

    Returns:
        dict: weighted terms with the names that they have in training, and ``total_loss``, their sum; {} but on rank 0.

    Raises:
        DatasetError: no image has a box that can be used.
        FloatingPointError: predictions are not finite.
    """
    rows = []
    with preserve_state(require_queries(model)) as bare:
        one = bare.pixel_mean.new_ones(())
        for batch in loader:
            names = ",".join(str(record["image_id"]) for record in batch)
            seed_all(zlib.crc32(f"{seed}:{names}".encode("utf-8", "surrogatepass")), bare.device)
            normalizers = StepNormalizers(*(LossNormalizers(one, counts) for counts in count_objects(batch)))
            outputs = bare.forward_outputs(batch, bare.denoising, normalizers=normalizers)
            losses = bare.losses(outputs, normalizers)
            divisors = {name: _divisor(loss) for name, loss in losses.items()}
            rows.append(_row(outputs, {name: loss.value for name, loss in losses.items()}))
    rows = gather(rows)
    if not comm.is_main_process():
        return {}
    objects, copies, terms = zip(*rows, strict=True)
    require_objects(sum(objects))
    totals = {"images": len(rows), "objects": sum(objects), "noised objects": sum(copies)}
    means = {name: sum(row[name] for row in terms) / max(totals[divisors[name]], 1) for name in terms[0]}
    return {**means, "total_loss": sum(means.values())}


def _divisor(loss: LossValue) -> str:
    """What the sum of a term over the images is divided by."""
    if loss.kind == "denoising":
        return "noised objects"
    return "images" if loss.is_mean else "objects"


def _row(outputs: ForwardOutputs, losses: dict[str, Tensor]) -> tuple[int, int, dict[str, float]]:
    """Objects, noised objects, and the losses of one image, read in one transfer."""
    copies = 0 if outputs.noised is None else len(outputs.noised.assignment)
    values = torch.stack(list(losses.values())).tolist()
    return sum(outputs.targets.counts), copies, dict(zip(losses, values, strict=True))
