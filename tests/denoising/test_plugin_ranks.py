"""QueryDenoising on two ranks: the normalizer is that of both, and DistributedDataParallel trains it."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dn_detr_d2 import DenoisingGenerator, QueryDenoising

COUNTS = {0: [3, 1], 1: [0, 0]}  # the second rank has no object at all


class Model(nn.Module):
    """Boxes are corrected by a linear function of the content."""

    def __init__(self, local):
        super().__init__()
        torch.manual_seed(0)
        quiet = {"label_noise_prob": 0.0, "center_noise_scale": 0.0, "size_noise_scale": 0.0}
        generator = DenoisingGenerator(num_classes=3, num_groups=2, **quiet)
        self.denoising = QueryDenoising(generator, dim=8, local_normalizer=local)
        self.classify, self.locate = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, targets):
        dn = self.denoising(targets)
        content, boxes, _ = dn.prepend(torch.zeros(len(targets), 2, 8), torch.full((len(targets), 2, 4), 0.5))
        logits = self.classify(content)[None]
        rest, mine = dn.split((logits, (boxes + self.locate(content)).sigmoid()[None]))
        return dn.losses(mine) | {"matching": rest[0].square().mean() + rest[1].square().mean()}


def targets_of(counts):
    torch.manual_seed(len(counts))
    return [{"labels": torch.randint(3, (n,)), "boxes": torch.rand(n, 4) * 0.4 + 0.3} for n in counts]


def train(folder, local):
    rank = torch.distributed.get_rank()
    model = DistributedDataParallel(Model(local))
    losses = model(targets_of(COUNTS[rank]))
    sum(losses.values()).backward()
    gradients = {name: x.grad.flatten().tolist() for name, x in model.module.named_parameters()}
    Path(folder, f"{rank}.json").write_text(json.dumps({"l1": losses["dn/l1"].item(), "gradients": gradients}))


@pytest.mark.parametrize("local", [False, True])
def test_two_ranks_divide_by_the_mean_of_their_noised_objects(tmp_path, local):
    from ranks import on_ranks

    on_ranks(train, str(tmp_path), local)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["gradients"] == second["gradients"]
    alone = Model(local)(targets_of(COUNTS[0]))["dn/l1"].item()  # divided by its own 2 x 4 copies
    assert first["l1"] == pytest.approx(alone * (1 if local else 2), rel=1e-5)  # the mean over both is 4
    assert second["l1"] == 0
