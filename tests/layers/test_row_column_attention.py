import torch

from dn_detr_d2.layers import AxisEncoding, RowColumnAttention, axis_coordinates, sine_encoding


def slow_attention(layer, x, px, py, grid, gx, gy, padding):
    """Anchor DETR Eq. 5 to 8, query by query and head by head."""
    (wqx, wqy, wkx, wky, wv), (bqx, bqy, bkx, bky, bv) = (
        p.chunk(5) for p in (layer.in_proj.weight, layer.in_proj.bias)
    )
    n, h, w, c = grid.shape
    width = c // layer.num_heads
    result = torch.zeros_like(x)
    for i in range(n):
        value = grid[i] @ wv.T + bv  # (h, w, C)
        key_x = torch.stack([(grid[i, y] + gx[i]) @ wkx.T + bkx for y in range(h)]).mean(0)  # (w, C)
        key_y = torch.stack([(grid[i, :, z] + gy[i]) @ wky.T + bky for z in range(w)]).mean(0)  # (h, C)
        for q in range(x.shape[1]):
            query_x, query_y = (x[i, q] + px[i, q]) @ wqx.T + bqx, (x[i, q] + py[i, q]) @ wqy.T + bqy
            for head in range(layer.num_heads):
                part = slice(head * width, (head + 1) * width)
                columns = (key_x[:, part] @ query_x[part]) / width**0.5
                rows = (key_y[:, part] @ query_y[part]) / width**0.5
                columns[padding[i, 0]], rows[padding[i, :, 0]] = -torch.inf, -torch.inf
                weights = rows.softmax(0)[:, None] * columns.softmax(0)[None]  # (h, w)
                result[i, q, part] = (weights[..., None] * value[..., part]).sum((0, 1))
    return layer.norm(x + layer.out_proj(result))


def test_rows_and_columns_are_weighed_as_the_slow_loop_weighs_them():
    n, q, h, w, c = 2, 3, 4, 5, 8
    layer = RowColumnAttention(c, 2)
    torch.nn.init.normal_(layer.in_proj.bias)
    padding = torch.zeros(n, h, w, dtype=torch.bool)
    padding[1, 3:], padding[1, :, 2:] = True, True
    inputs = (torch.randn(n, q, c), torch.randn(n, q, c), torch.randn(n, q, c), torch.randn(n, h, w, c))
    inputs += (torch.randn(n, w, c), torch.randn(n, h, c), padding)
    torch.testing.assert_close(layer(*inputs), slow_attention(layer, *inputs), atol=1e-5, rtol=1e-5)


def test_coordinates_are_the_centres_of_the_cells_inside_the_image():
    padding = torch.zeros(1, 2, 4, dtype=torch.bool)
    padding[:, :, 3:] = True
    x, y = axis_coordinates(padding)
    torch.testing.assert_close(x, torch.tensor([[1, 3, 5, 5]]) / 6)  # constant on padding
    torch.testing.assert_close(y, torch.tensor([[0.25, 0.75]]))


def test_the_encoding_of_an_axis_is_a_learnt_function_of_its_sine_encoding():
    encode = AxisEncoding(8)
    first, _, second = encode.layers
    sine = sine_encoding(torch.tensor([0.3]) * 2 * torch.pi, 8)
    torch.testing.assert_close(
        encode(torch.tensor([0.3])), (sine @ first.weight.T + first.bias).relu() @ second.weight.T + second.bias
    )


def test_weights_of_rows_and_columns_are_dropped_in_training_alone():
    """As the authors' code drops them. With every weight but a half kept, what is found differs from pass to pass."""
    layer = RowColumnAttention(8, 2, 0.5).train()
    layer.dropout.forward = lambda x: x  # not that of the residual branch
    x, grid = torch.randn(1, 3, 8), torch.randn(1, 4, 5, 8)
    arguments = (x, x, x, grid, grid.mean(1), grid.mean(2), torch.zeros(1, 4, 5, dtype=torch.bool))
    assert not torch.equal(layer(*arguments), layer(*arguments))
    assert torch.equal(layer.eval()(*arguments), layer(*arguments))
