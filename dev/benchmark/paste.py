"""Masks of the detections of one image in its pixels: our pasting against all maps at once, as the authors' code does it."""

import statistics
import time

import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import sem_seg_postprocess
from torch import Tensor

from dn_detr_d2.modeling.mask_postprocess import paste_masks


def make_masks(count: int, image_size: tuple[int, int], seed: int = 0) -> Tensor:
    """(count, h, w) smooth random mask logits of an image that is padded to a multiple of 32."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 3 * torch.randn(1, count, 12, 20, generator=generator)
    return F.interpolate(coarse, size=[-(-x // 32) * 8 for x in image_size], mode="bicubic")[0]


def paste_at_once(mask_logits: Tensor, image_size: tuple[int, int], wanted: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What :func:`paste_masks` gives, with every map in memory at once."""
    padded = F.interpolate(mask_logits[None], scale_factor=4.0, mode="bilinear", align_corners=False)[0]
    logits = sem_seg_postprocess(padded, image_size, *wanted)
    masks = (logits > 0).float()
    means = (logits.sigmoid().flatten(1) * masks.flatten(1)).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    return masks > 0, means


def measure_paste(
    count: int = 100, image_size: tuple[int, int] = (800, 1333), rounds: int = 5, device: str = "cpu"
) -> dict[str, float]:
    """Medians over interleaved rounds: seconds of ``ours`` and ``at_once``, and their ``ratio`` (at once / ours)."""
    masks = make_masks(count, image_size).to(device)
    times = {"ours": [], "at_once": []}
    for _ in range(rounds + 1):
        for name, paste in (("ours", paste_masks), ("at_once", paste_at_once)):
            start = time.perf_counter()
            paste(masks, image_size, image_size)
            if masks.is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    found = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}  # the first one warms up
    return found | {"ratio": found["at_once"] / found["ours"]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print({name: round(value, 3) for name, value in measure_paste().items()})
