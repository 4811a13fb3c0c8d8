"""The losses of the training on annotated images that are not trained on."""

import zlib
from collections.abc import Iterable

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from ..modeling.meta_arch import Observation
from ..structures import Share
from ..utils.rng import seed_all
from .isolation import gather, untouched
from .probe import require_objects


def validation_losses(model: nn.Module, loader: Iterable[list[dict]], seed: int = 0) -> dict[str, float]:
    """Every loss term over all images as over one large batch; in evaluation mode, so without dropout.

    Terms are summed over the images of all ranks and divided by the number of objects, denoising terms by the number of
    noised ones; means over queries (the class loss of :class:`~dn_detr_d2.modeling.criterion.SoftmaxCriterion`) by the
    number of images. So neither the order of the images nor the number of processes matters.

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
    with untouched(model) as bare:
        one = bare.pixel_mean.new_ones(())
        for batch in loader:
            names = ",".join(str(record["image_id"]) for record in batch)
            seed_all(zlib.crc32(f"{seed}:{names}".encode("utf-8", "surrogatepass")), bare.device)
            seen = bare.observe(batch, bare.denoising)
            rows.append(_row(seen, bare.weighted_losses(seen, Share(seen.targets.whole, one, one))))
        means = bare.criterion.MEANS
    rows = gather(rows)
    if not comm.is_main_process():
        return {}
    objects, copies, terms = zip(*rows, strict=True)
    require_objects(sum(objects))
    losses = {}
    for name in terms[0]:
        group, term = name.split("/")
        mean = term.split("_")[0] in means
        divisor = len(rows) if mean else sum(copies if group == "dn" else objects)
        losses[name] = sum(row[name] for row in terms) / max(divisor, 1)
    return {**losses, "total_loss": sum(losses.values())}


def _row(seen: Observation, losses: dict[str, Tensor]) -> tuple[int, int, dict[str, float]]:
    """Objects, noised objects, and the losses of one image, read in one transfer."""
    copies = 0 if seen.noised is None else len(seen.noised.assignment)
    values = torch.stack(list(losses.values())).tolist()
    return sum(seen.targets.counts), copies, dict(zip(losses, values, strict=True))
