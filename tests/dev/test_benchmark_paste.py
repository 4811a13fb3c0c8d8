"""Both ways to paste masks give the same masks."""

import torch

from dev.benchmark.paste import make_masks, measure_paste, paste_at_once
from dn_detr_d2.modeling.mask_postprocess import paste_masks


def test_both_ways_give_the_same_masks():
    masks = make_masks(3, (50, 70))
    assert masks.shape == (3, 16, 24)
    (ours, mean), (theirs, their_mean) = (paste(masks, (50, 70), (40, 90)) for paste in (paste_masks, paste_at_once))
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(mean, their_mean)
    found = measure_paste(2, (50, 70), rounds=1)
    assert set(found) == {"ours", "at_once", "ratio"}
    assert min(found.values()) > 0
