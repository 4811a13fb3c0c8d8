"""Where queries look, against the modules' own results and against slow loops."""

import math

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import make_batch
from naming import naming
from PIL import Image

from dn_detr_d2 import ConfigError, MultiScaleDeformableAttention
from dn_detr_d2.layers import MultiLevelConditionalCrossAttention
from dn_detr_d2.layers.attention import attend
from dn_detr_d2.modeling.postprocess import select_top
from dn_detr_d2.structures import Memory
from dn_detr_d2.visualization.attention import best_queries, draw_attention, verdict
from dn_detr_d2.visualization.images import to_rgb
from dn_detr_d2.visualization.recording import attention_weights, heat_map, multi_level_maps, on_image, record, sampling
from tools import visualize_attention

DEFORMABLE, DENSE = ("dab_deformable_detr", "dn_deformable_detr", "dino"), ("dab_detr", "dn_detr", "encoder_only")


@pytest.fixture
def recorded(toy_model):
    """recorded(system) -> (model, image, pass, layers)."""

    def run(system, *overrides):
        model = toy_model(system, *overrides).eval()
        (image,) = make_batch(2, sizes=((72, 100),))
        return model, image, *record(model, image)

    return run


@pytest.fixture
def saved(toy_cfg, toy_model, tmp_path):
    """saved(system) -> (config file, weights, image file)."""

    def save(system):
        config, weights, image = (tmp_path / f"{system}.{suffix}" for suffix in ("yaml", "pth", "png"))
        config.write_text(toy_cfg(system, "INPUT.MIN_SIZE_TEST", 64, "MODEL.DN_DETR.CLASS_NAMES", list("abcde")).dump())
        torch.save({"model": toy_model(system).state_dict()}, weights)
        Image.fromarray(np.random.RandomState(0).randint(0, 256, (60, 90, 3), np.uint8)).save(image)
        return str(config), str(weights), str(image)

    return save


def bilinear(features, x, y):
    """Value of (h, w, D) at (x, y) in [0, 1] from edge to edge, zero outside: four corners, one by one."""
    height, width, _ = features.shape
    column, row = x * width - 0.5, y * height - 0.5
    total = torch.zeros(features.shape[2])
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * features[i, j]
    return total


@pytest.mark.parametrize("coordinates", [2, 4])
def test_sampling_by_hand_at_the_locations_gives_what_the_module_gives(coordinates):
    module = MultiScaleDeformableAttention(8, 2, 2, 3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    shapes, padding = [(4, 6), (2, 3)], torch.zeros(1, 30, dtype=torch.bool)
    query, tokens, reference = torch.randn(1, 5, 8), torch.randn(1, 30, 8), torch.rand(1, 5, 2, coordinates)
    with torch.no_grad():
        expected = module(query, reference, tokens, padding, shapes)[0]
        found = sampling(module, query, reference, tokens, padding, shapes)
        value = module.value_proj(tokens)[0].view(30, 2, 4)
        levels = [value[:24].view(4, 6, 2, 4), value[24:].view(2, 3, 2, 4)]
        for q in range(5):
            heads = []
            for h in range(2):
                weights, places = found.weights[q, h], found.locations[q, h].tolist()
                samples = [
                    weights[i, k] * bilinear(levels[i][:, :, h], *places[i][k]) for i in range(2) for k in range(3)
                ]
                heads.append(sum(samples))
            torch.testing.assert_close(module.output_proj(torch.cat(heads)), expected[q], atol=1e-5, rtol=1e-4)
    assert found.around_point == (coordinates == 2)
    torch.testing.assert_close(found.weights.sum((-1, -2)), torch.ones(5, 2))


def test_attention_weights_are_a_slow_softmax_and_give_what_attend_gives():
    query, key, value = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 4)
    padding = torch.tensor([[False] * 5, [False, False, True, False, True]])
    weights = attention_weights(query, key, 2, padding)
    for n, h, q in np.ndindex(2, 2, 3):
        scores = [math.exp(float(query[n, q, 4 * h : 4 * h + 4] @ key[n, s, 4 * h : 4 * h + 4]) / 2) for s in range(5)]
        scores = [0.0 if padding[n, s] else score for s, score in enumerate(scores)]
        torch.testing.assert_close(weights[n, h, q], torch.tensor([score / sum(scores) for score in scores]))
    mixed = (weights @ value.unflatten(-1, (2, 2)).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, attend(query, key, value, 2, padding[:, None]))


@pytest.mark.parametrize("system", DENSE)
def test_maps_sum_to_1_and_have_a_column_for_each_cell(recorded, system):
    model, _, seen, layers = recorded(system)
    queries, cells = model.query_source.num_queries, sum(h * w for h, w in seen.memory.shapes)
    assert len(layers) == 3
    for layer in layers:
        assert layer.maps.shape == (queries, cells)
        torch.testing.assert_close(layer.maps.sum(1), torch.ones(queries))
        assert layer.sampling is None


@pytest.mark.parametrize("system", DEFORMABLE)
def test_sampling_weights_sum_to_1(recorded, system):
    _, _, _, layers = recorded(system)
    for layer in layers:
        assert layer.sampling.locations.shape == (*layer.sampling.weights.shape, 2)
        torch.testing.assert_close(layer.sampling.weights.sum((-1, -2)), torch.ones(9, 4))
        assert layer.maps is None


def test_the_map_of_the_recording_explains_the_output_of_the_layer(recorded):
    """One head: the mean over the heads is the attention itself, so map times values is what the module mixed."""
    model, _, seen, layers = recorded("dn_detr", "MODEL.DN_DETR.DECODER.NUM_HEADS", 1)
    module, mixed = model.decoder.layers[1].cross_attn, []
    handle = module.out_proj.register_forward_pre_hook(lambda _, arguments: mixed.append(arguments[0]))
    with torch.no_grad():
        model.decoder(seen.queries, seen.memory)
        value = module.value(seen.memory.tokens)[0]
    handle.remove()
    torch.testing.assert_close(layers[1].maps @ value, mixed[0][0], atol=1e-5, rtol=1e-4)


def test_a_level_has_the_share_that_the_query_gives_it():
    module = MultiLevelConditionalCrossAttention(8, 2, 2)
    x, tokens, padding = torch.randn(1, 3, 8), torch.randn(1, 8, 8), torch.zeros(1, 8, dtype=torch.bool)
    with torch.no_grad():
        maps = multi_level_maps(module, x, x, x, tokens, tokens, padding, [(2, 3), (1, 2)], x)
        shares = module.level_weights(x).softmax(-1)
    torch.testing.assert_close(torch.stack([maps[..., :6].sum(-1), maps[..., 6:].sum(-1)], -1), shares)


@pytest.mark.parametrize("system", ["dino", "dab_detr", "encoder_only"])
def test_recording_changes_nothing_and_leaves_no_hook(recorded, system):
    model, image, seen, layers = recorded(system)
    with torch.no_grad():
        plain = model.forward_outputs([image], annotated=False)
    assert torch.equal(plain.predictions.boxes, seen.predictions.boxes)
    assert torch.equal(plain.predictions.logits, seen.predictions.logits)
    assert not any(module._forward_pre_hooks for module in model.decoder.modules())
    torch.testing.assert_close(layers[0].boxes, seen.queries.boxes[0])


def test_locations_of_padded_levels_come_back_to_the_image():
    ratios = torch.tensor([[[0.5, 0.8], [0.6, 1.0]]])  # (width, height) of two levels
    memory = Memory(None, None, None, [(4, 4), (2, 2)], ratios)
    locations = torch.tensor([[0.25, 0.4], [0.3, 0.5]]).view(1, 1, 2, 1, 2)  # the middle of the image on both
    torch.testing.assert_close(on_image(locations, memory), torch.full((1, 1, 2, 1, 2), 0.5))


def test_points_of_a_query_without_offsets_lie_in_the_middle_of_its_box(toy_model):
    model = toy_model("dn_deformable_detr").eval()
    for layer in model.decoder.layers:
        torch.nn.init.zeros_(layer.cross_attn.sampling_offsets.weight)
        torch.nn.init.zeros_(layer.cross_attn.sampling_offsets.bias)
    (image,) = make_batch(1, sizes=((70, 90),))
    model.size_divisibility = 64
    seen, layers = record(model, image)
    assert (seen.memory.valid_ratios < 1).any()  # 70 x 90 became 128 x 128
    for layer in layers:
        points = on_image(layer.sampling.locations, seen.memory)
        torch.testing.assert_close(points, layer.boxes[:, None, None, None, :2].expand_as(points))


def test_heat_keeps_its_sum_and_its_place():
    fine, coarse = torch.rand(24), torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert torch.equal(heat_map(fine, [(4, 6)]), fine.view(4, 6))
    heat = heat_map(torch.cat([fine, coarse]), [(4, 6), (2, 2)])
    torch.testing.assert_close(heat.sum(), fine.sum() + 1)
    added = heat - fine.view(4, 6)
    assert added[2:, 3:].sum() > 0.6
    assert added[:1, :1].sum() == 0


def test_the_best_queries_are_those_of_the_best_detections(recorded):
    _, _, seen, _ = recorded("dino")
    logits, boxes = seen.predictions.logits[-1, 0], seen.predictions.boxes[-1, 0]
    best = select_top(logits, boxes, (1, 1), 1)
    (query,) = best_queries(seen, 1, list("abcde"))
    assert logits[query].max().sigmoid() == best.scores[0]
    assert len(best_queries(seen, 100, list("abcde"))) == 9


def test_no_object_is_no_detection(recorded):
    """It used to end in an IndexError, or to be the best of all."""
    _, image, seen, layers = recorded("dn_detr", "MODEL.DN_DETR.LOSS.CLASS_LOSS", "softmax")
    logits = seen.predictions.logits
    logits[...] = torch.tensor([0.0, 0, 1, 0, 0, 3])
    logits[-1, 0, 4] = torch.tensor([0.0, 2, 0, 0, 0, 3])
    assert best_queries(seen, 1, list("abcde")) == [4]
    total = 4 + math.exp(2) + math.exp(3)
    assert verdict(seen, 4, -1, list("abcde")) == f"b {math.exp(2) / total:.2f}"
    figure = draw_attention(seen, layers, 0, to_rgb(image["image"], "RGB"), list("abcde"))
    assert "layer 1: c " in figure.axes[0].get_title()


def test_a_point_reference_is_a_cross_and_a_box_is_a_box(recorded):
    for layer, crosses in (("PointDecoderLayer", 3), ("FirstPointDecoderLayer", 1)):
        arguments = ["MODEL.DN_DETR.DENOISING.NAME", "", "MODEL.DN_DETR.QUERY_SOURCE.NAME", "LearnedQueries"]
        _, image, seen, layers = recorded("dab_deformable_detr", *arguments, "MODEL.DN_DETR.DECODER.LAYER", layer)
        figure = draw_attention(seen, layers, 0, to_rgb(image["image"], "RGB"), list("abcde"))
        assert sum(len(panel.lines) for panel in figure.axes) == crosses
        assert [len(panel.patches) for panel in figure.axes[:3]] == [1 + (i >= crosses) for i in range(3)]


@pytest.mark.parametrize("system", ["dn_deformable_detr", "dn_detr", "encoder_only"])
def test_pictures_of_every_kind_of_attention(saved, system, tmp_path, capsys):
    config, weights, image = saved(system)
    arguments = ["--config-file", config, "--weights", weights, "--input", image, "--output", str(tmp_path / "out")]
    assert visualize_attention.main([*arguments, "--best", "1"]) == 0
    (path,) = (tmp_path / "out").iterdir()
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" -> {path}")
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] == 1140  # three panels of 3.8 inches at 100 dots an inch
    assert len(np.unique((picture[:, :, :3] @ [65536, 256, 1] * 255).astype(int))) > 500


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--output", "{image}"], ["{image}"]),
        (["--query", "9"], ["--query", 9, 8]),
        (["--best", "0"], ["--best", 1, 0]),
        (["--weights", "no.pth"], ["--weights", "no.pth"]),
        (["--weights", "{other}"], ["{other}"]),
        (["--weights", "{image}"], ["{image}"]),
        (["--input", "no.jpg"], ["no.jpg"]),
        (["--input", "{config}"], ["{config}"]),
        (["--config-file", "no.yaml"], ["'no.yaml'"]),
    ],
)
def test_bad_input_is_one_sentence(saved, tmp_path, capsys, arguments, named):
    (config, weights, image), other = saved("dn_detr"), saved("dino")[1]
    command = ["--config-file", config, "--weights", weights, "--input", image, "--output", str(tmp_path / "out")]
    arguments, named = ([str(x).format(other=other, image=image, config=config) for x in y] for y in (arguments, named))
    assert visualize_attention.main([*command, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert naming(*named).search(error)
    assert not (tmp_path / "out").exists()


def test_one_query_can_be_named(saved, tmp_path):
    config, weights, image = saved("dino")
    command = ["--config-file", config, "--weights", weights, "--input", image, "--output", str(tmp_path / "out")]
    assert visualize_attention.main([*command, "--query", "4", "MODEL.DN_DETR.NUM_CLASSES", "auto"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dino_query4.png"]


class Blind(torch.nn.Module):
    def forward(self, query, *image):
        return torch.zeros_like(query)


def test_an_unknown_attention_is_refused(recorded):
    model, image, *_ = recorded("dino")
    for layer in model.decoder.layers:
        layer.cross_attn = Blind()
    with pytest.raises(ConfigError, match=naming("Blind")):
        record(model, image)
