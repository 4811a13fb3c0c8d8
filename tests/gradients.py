"""The gradient of a training step as one vector, on one process and on several, whole or in parts."""

from contextlib import contextmanager, nullcontext

import torch
from conftest import make_batch, off_the_start
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from dn_detr_d2.engine import TrainStep
from dn_detr_d2.modeling import points

NOISE = ("LABEL_NOISE_PROB", "CENTER_NOISE_SCALE", "SIZE_NOISE_SCALE", "CORNER_NOISE_SCALE")
QUIET = [x for key in NOISE for x in (f"MODEL.DN_DETR.DENOISING.{key}", 0.0)]
HIDDEN = ["MODEL.DN_DETR.DENOISING.MASK_PADDING", True]
COUNTS = [(3, 1, 0, 2), (0, 0, 1, 4)]  # objects of four images; two of two processes in the second case have none


class Gradient(torch.optim.SGD):
    """Leaves the weights, and keeps the gradients of the last step."""

    def __init__(self, parameters):
        super().__init__(parameters, 0.0)
        self.seen = None

    def step(self, closure=None):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]


def gradients(model, batch, accumulation, dtype=None):
    """(flat gradient of a step, its terms)."""
    optimizer = Gradient(model.parameters())
    step = TrainStep(model, [batch], optimizer, dtype, "", accumulation=accumulation)
    with EventStorage() as storage:
        step.run_step()
        terms = {name: value for name, (value, _) in storage.latest().items() if "/" in name}
    return torch.cat([g.flatten() for g in optimizer.seen]), terms


def distance(a, b):
    """Of two vectors, as a part of the second's length."""
    return ((a - b).norm() / b.norm()).item()


@contextmanager
def in_float64():
    """New models compute in float64, where rounding does not hide a difference."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def same_points(kind, num_sets, num_points, device):
    """In the place of ``dn_detr_d2.modeling.points.random_points``: the same points for all masks of a kind."""
    generator = torch.Generator().manual_seed(len(kind))
    points = torch.rand(1, num_points, 2, generator=generator, dtype=torch.get_default_dtype())
    return points.expand(num_sets, -1, -1)


def of_this_rank(cfg, folder, accumulation, cases=COUNTS, double=True, masks=False):
    """Gradients of the cases, of which a process has its share; rank 0 saves them: "{processes}_{accumulation}.pth"."""
    if masks:
        points.random_points = same_points  # the process ends here
    torch.set_num_threads(1)
    results = []
    share = 4 // comm.get_world_size()
    mine = slice(comm.get_rank() * share, (comm.get_rank() + 1) * share)
    with in_float64() if double else nullcontext():
        for counts in cases:
            torch.manual_seed(0)
            model = off_the_start(build_model(cfg))
            model = create_ddp_model(model, device_ids=None, broadcast_buffers=False).train()
            results.append(gradients(model, make_batch(*counts, sizes=((64, 64),), masks=masks)[mine], accumulation)[0])
    if comm.is_main_process():
        torch.save(results, f"{folder}/{comm.get_world_size()}_{accumulation}.pth")
