"""The check of a decoder's mask, with decoders whose leaks are known."""

import pytest
import torch

from dn_detr_d2 import DenoisingGenerator, LeakError, QueryDenoising, check_isolation

TARGETS = [
    {"labels": torch.tensor([1, 2]), "boxes": torch.full((2, 4), 0.4)},
    {"labels": torch.tensor([0]), "boxes": torch.full((1, 4), 0.6)},
]


def make(groups=3, queries=4, **options):
    dn = QueryDenoising(DenoisingGenerator(num_classes=3, num_groups=groups), dim=8, **options)(TARGETS)
    dn.prepend(torch.randn(2, queries, 7), torch.full((2, queries, 4), 0.5))
    return dn


def averaging(leak=None):
    """A decoder that adds to each query the mean of what it sees; ``leak`` (query, key) is opened."""

    def decode(content, boxes, mask):
        seen = ~(torch.zeros(content.shape[1], content.shape[1], dtype=torch.bool) if mask is None else mask)
        if leak is not None:
            assert not seen[leak]
            seen[leak] = True
        x = torch.cat([content, boxes], -1)
        out = x + (seen / seen.sum(-1, keepdim=True)) @ x
        return out[None, ..., :8], out[None, ..., 8:]

    return decode


def test_a_decoder_with_the_mask_passes_and_the_trials_are_counted():
    """3 groups: 2 binary digits, of which digit 1 is 1 for group 2; 4 sets, 3 strengths each."""
    assert check_isolation(averaging(), make()) == 12


@pytest.mark.parametrize(
    ("leak", "who"),
    [((6, 0), "1 of 4 matching"), ((9, 5), "1 of 4 matching"), ((0, 2), "other groups"), ((4, 1), "other groups")],
)
def test_one_open_entry_is_found(leak, who):
    with pytest.raises(LeakError, match=who):
        check_isolation(averaging(leak), make())


def test_without_a_mask_everything_leaks():
    with pytest.raises(LeakError, match="4 of 4 matching"):
        check_isolation(averaging(), make(attention_mask=False))


def test_a_norm_over_the_queries_leaks_whatever_the_mask_says():
    def decode(content, boxes, mask):
        return (content / content.norm(dim=1, keepdim=True))[None], boxes[None]

    with pytest.raises(LeakError, match="4 of 4"):
        check_isolation(decode, make())


def test_what_the_table_opens_is_no_leak():
    dn = make(groups=2)
    dn.noised.groups.visible[:, 1] = True
    dn.prepend(torch.randn(2, 4, 7), torch.full((2, 4, 4), 0.5))
    check_isolation(averaging(), dn)
    with pytest.raises(LeakError):
        check_isolation(averaging((5, 0)), dn)


def test_dropout_is_told_from_a_leak():
    with pytest.raises(ValueError, match="evaluation mode"):
        check_isolation(lambda content, boxes, mask: (torch.rand_like(content)[None], boxes[None]), make())


def test_nothing_to_check_is_refused():
    denoising = QueryDenoising(DenoisingGenerator(num_classes=3), dim=8)
    with pytest.raises(ValueError, match="prepend"):
        check_isolation(averaging(), denoising(TARGETS))
    dn = denoising.eval()(TARGETS)
    dn.prepend(torch.randn(2, 4, 7), torch.full((2, 4, 4), 0.5))
    with pytest.raises(ValueError, match="training mode"):
        check_isolation(averaging(), dn)


def test_random_streams_and_gradients_are_left_alone():
    dn = make()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    check_isolation(averaging(), dn)
    assert torch.equal(torch.rand(3), expected)
    assert dn.joined.content.requires_grad
