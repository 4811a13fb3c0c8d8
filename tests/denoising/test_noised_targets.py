"""The attention mask against loops that spell out the paper's rules, in 36 settings."""

import itertools

import pytest
import torch

from dn_detr_d2 import DenoisingGenerator
from dn_detr_d2.structures import Targets


def noise(counts, groups, mask_padding=False):
    generator = DenoisingGenerator(
        num_classes=5,
        num_groups=groups,
        label_noise_prob=0.2,
        center_noise_scale=0.4,
        size_noise_scale=0.4,
        mask_padding=mask_padding,
    )
    return generator(
        Targets.pad([torch.ones(n, dtype=torch.int64) for n in counts], [torch.rand(n, 4) for n in counts])
    )


def written_mask(slots_per_group, groups, num_matching):
    """DN-DETR's two rules one entry at a time: nobody looks into another group, matching queries into none."""
    d = slots_per_group * groups
    blocked = torch.zeros(d + num_matching, d + num_matching, dtype=torch.bool)
    for query in range(d + num_matching):
        for key in range(d):
            if query >= d or query // slots_per_group != key // slots_per_group:
                blocked[query, key] = True
    return blocked


@pytest.mark.parametrize(
    ("counts", "groups", "num_matching"),
    list(itertools.product([(1,), (3, 1), (0, 2), (0, 0)], [1, 2, 5], [1, 4, 9])),
)
def test_mask_equals_written_loops(counts, groups, num_matching):
    mask = noise(counts, groups).attention_mask(num_matching)
    assert torch.equal(mask, written_mask(max(*counts, 1, 1), groups, num_matching))


def test_no_query_is_blocked_from_everything():
    for mask_padding in (False, True):
        mask = noise((3, 1, 0), 2, mask_padding).attention_mask(4)
        assert not mask.all(-1).any()


def test_hidden_padding_is_blocked_for_its_own_image_only():
    noised = noise((3, 1), 2, mask_padding=True)
    mask, plain = noised.attention_mask(4), noise((3, 1), 2).attention_mask(4)
    assert torch.equal(mask[0], plain)
    padded = torch.tensor([1, 2, 4, 5])
    assert mask[1][:, padded].all()
    rest = torch.tensor([0, 3, 6, 7, 8, 9])
    assert torch.equal(mask[1][:, rest], plain[:, rest])
