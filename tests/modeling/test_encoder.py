import pytest
import torch

from dn_detr_d2.modeling.encoder import cell_centres, flatten_pyramid, valid_ratio
from dn_detr_d2.modeling.neck import padding_mask, shrink_mask
from dn_detr_d2.modeling.registry import DECODER_LAYER_REGISTRY
from dn_detr_d2.structures import Pyramid


def test_padding_mask_marks_right_and_bottom():
    mask = padding_mask(torch.tensor([(2, 3), (3, 1)]), 3, 4)
    assert mask[0].int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    assert mask[1].int().tolist() == [[0, 1, 1, 1]] * 3


def test_shrinking_a_mask_takes_the_nearest_pixel():
    """Cell j of w looks at pixel floor(j * W / w): for 5 -> 2 these are 0 and 2."""
    mask = padding_mask(torch.tensor([(4, 2)]), 4, 5)
    assert shrink_mask(mask, (2, 2))[0].int().tolist() == [[0, 1], [0, 1]]


def test_valid_ratio_is_width_then_height():
    mask = padding_mask(torch.tensor([(2, 3)]), 4, 4)
    assert valid_ratio(mask).tolist() == [[0.75, 0.5]]


def make_memory(sizes, shapes):
    padding = [padding_mask(torch.tensor(sizes), h, w) for h, w in shapes]
    maps = [torch.randn(len(sizes), 4, h, w) for h, w in shapes]
    return flatten_pyramid(Pyramid(maps, [torch.zeros_like(x) for x in maps], padding)), maps


def test_tokens_are_levels_in_rows():
    memory, maps = make_memory([(2, 3)], [(2, 3), (1, 2)])
    assert memory.shapes == [(2, 3), (1, 2)]
    assert torch.equal(memory.tokens[0, 4], maps[0][0, :, 1, 1])
    assert torch.equal(memory.tokens[0, 7], maps[1][0, :, 0, 1])


def test_cell_centres_without_padding_are_the_centres():
    memory, _ = make_memory([(2, 4)], [(2, 4)])
    expected = [[(x + 0.5) / 4, (y + 0.5) / 2] for y in range(2) for x in range(4)]
    torch.testing.assert_close(cell_centres(memory)[0, :, 0], torch.tensor(expected))


def test_cell_centres_of_a_padded_image_equal_those_of_the_image_alone_on_its_own_scale():
    """Dividing by the padded size: a cell of the image lies where the unpadded image has it, times the valid ratio."""
    padded, _ = make_memory([(2, 2)], [(4, 4)])
    alone, _ = make_memory([(2, 2)], [(2, 2)])
    inside = [0, 1, 4, 5]
    torch.testing.assert_close(cell_centres(padded)[0, inside], cell_centres(alone)[0] * 0.5)


@pytest.mark.parametrize("name", sorted(name for name, _ in DECODER_LAYER_REGISTRY))
def test_a_misspelt_argument_of_a_decoder_layer_is_no_argument(name):
    layer = DECODER_LAYER_REGISTRY.get(name)
    known = {"dim": 8, "num_heads": 2, "ffn_dim": 8, "dropout": 0.0, "index": 0, "num_levels": 2, "num_points": 2}
    layer(**known)
    with pytest.raises(TypeError, match="dropuot"):
        layer(**known, dropuot=0.3)
