"""Pictures of denoising, against layouts counted by hand and noise that is switched off."""

import json

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import DENOISING_SYSTEMS, ROOT, make_batch
from detectron2.data import DatasetCatalog, MetadataCatalog
from naming import naming
from PIL import Image

from dn_detr_d2 import ConfigError, DatasetError
from dn_detr_d2.data import register_coco_json
from dn_detr_d2.visualization.denoising import copies_of, draw_mask, draw_noise, draw_refinement, mean_iou
from dn_detr_d2.visualization.images import to_pixels, to_rgb
from dn_detr_d2.visualization.models import choose, observe_denoising
from tools import visualize_denoising

QUIET = [f"MODEL.DN_DETR.DENOISING.{key}" for key in ("LABEL_NOISE_PROB", "CENTER_NOISE_SCALE", "SIZE_NOISE_SCALE")]
NAMES = ["a", "b", "c", "d", "e"]


@pytest.fixture
def observe(toy_model):
    """observe(system, *overrides) -> (pass over an image of three objects, its pixels)."""

    def run(system, *overrides):
        model = toy_model(system, *overrides).eval()
        (record,) = make_batch(3, sizes=((64, 96),), masks=True)
        return observe_denoising(model, record, 0), to_rgb(record["image"], "RGB")

    return run


@pytest.fixture
def saved(toy_cfg, toy_model, tmp_path):
    """saved(system) -> config file of a small model of three classes; saved(system, True) -> its weights too."""

    def save(system, with_weights=False):
        overrides = ("MODEL.DN_DETR.NUM_CLASSES", 3, "INPUT.MIN_SIZE_TEST", 64)
        config, weights = tmp_path / f"{system}.yaml", tmp_path / f"{system}.pth"
        config.write_text(toy_cfg(system, *overrides).dump())
        if not with_weights:
            return str(config)
        torch.save({"model": toy_model(system, *overrides).state_dict()}, weights)
        return str(config), str(weights)

    return save


@pytest.fixture(scope="module", autouse=True)
def three_images(tmp_path_factory):
    """The data set three_images: classes a, b, c and two objects an image; ids 4, 5, 6."""
    folder = tmp_path_factory.mktemp("three_images")
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for i, name in enumerate("abc")]}
    for image_id in (4, 5, 6):
        pixels = np.random.RandomState(image_id).randint(0, 256, (64, 96, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{image_id}.png")
        content["images"].append({"id": image_id, "file_name": f"{image_id}.png", "height": 64, "width": 96})
        for box in ([10, 10, 30, 40], [50, 20, 30, 30]):
            number = len(content["annotations"]) + 1
            content["annotations"].append({"id": number, "image_id": image_id, "category_id": number % 3, "bbox": box})
    (folder / "set.json").write_text(json.dumps(content))
    register_coco_json("three_images", str(folder / "set.json"), str(folder))
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.remove("three_images")


def titles(figure):
    return [panel.get_title() for panel in figure.axes if panel.get_title()]


def test_copies_are_where_the_layout_says(observe):
    outputs, _ = observe("dino", "MODEL.DN_DETR.DENOISING.NUM_QUERIES", 12)  # 12 // 3 objects = 4 groups of 2 x 3 slots
    near, far = copies_of(outputs, 2)
    assert near.slot.tolist() == [12, 13, 14]
    assert far.slot.tolist() == [15, 16, 17]
    assert near.target.tolist() == far.target.tolist() == [0, 1, 2]
    assert (near.style, far.style) == ("--", ":")
    (only,) = copies_of(observe("dn_detr")[0], 4)
    assert only.slot.tolist() == [12, 13, 14]


def test_near_copies_lie_nearer_than_far_ones(observe):
    outputs, pixels = observe("dino", "MODEL.DN_DETR.DENOISING.NUM_QUERIES", 300)
    clean, noisy = (to_pixels(x.boxes[0], pixels, outputs.memory) for x in (outputs.targets, outputs.noised))
    iou = [[mean_iou(noisy[c.slot], clean[c.target]) for c in copies_of(outputs, g)] for g in range(100)]
    near, far = torch.tensor(iou).mean(0)
    assert near > far + 0.15


def test_without_noise_nothing_is_flipped_and_the_start_is_perfect(observe):
    outputs, pixels = observe("dn_deformable_detr", *(x for key in QUIET for x in (key, 0.0)))
    assert titles(draw_noise(outputs, pixels, NAMES, 2)) == [f"group {g} of 5: 0 of 3 labels flipped" for g in (1, 2)]
    assert titles(draw_refinement(outputs, pixels, NAMES))[0] == "noised: mean IoU 1.00, 3 of 3 labels right"


def test_flipped_labels_are_counted_and_written(observe):
    outputs, pixels = observe("dn_detr", QUIET[0], 1.0)
    flips = (outputs.noised.labels.view(5, 3) != outputs.targets.labels).sum(1).tolist()
    assert sum(flips) > 5  # at chance 1, 4 in 5 of the 15 change
    figure = draw_noise(outputs, pixels, NAMES, 5)
    assert titles(figure) == [f"group {g + 1} of 5: {flip} of 3 labels flipped" for g, flip in enumerate(flips)]
    written = [text for panel in figure.axes for text in panel.texts]
    assert len(written) == 15
    assert sum("(is " in text.get_text() for text in written) == sum(flips)
    assert sum(text.get_fontweight() == "bold" for text in written) == sum(flips)


def test_refinement_shows_the_predictions_of_every_layer(observe):
    outputs, pixels = observe("encoder_only")
    shown = titles(draw_refinement(outputs, pixels, NAMES, group=1))
    assert [title.split(":")[0] for title in shown] == ["noised", "layer 1", "layer 2", "layer 3"]
    height, width = pixels.shape[:2]
    expected = 0.0
    for slot in (3, 4, 5):  # group 1 of three objects, without any of the tool's functions
        (ax, ay, aw, ah), (bx, by, bw, bh) = (
            outputs.predictions.boxes[2, 0, slot].tolist(),
            outputs.targets.boxes[0, slot - 3].tolist(),
        )
        w = max(0, min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2)) * width
        h = max(0, min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2)) * height
        expected += w * h / ((aw * ah + bw * bh) * width * height - w * h) / 3
    assert f"mean IoU {expected:.2f}" in shown[-1]


def test_wrong_labels_are_written_at_every_stage_and_no_object_is_none_of_them(observe):
    """A model with softmax has a sixth class, which is likeliest everywhere here."""
    outputs, pixels = observe("dn_detr", QUIET[0], 1.0, "MODEL.DN_DETR.LOSS.CLASS_LOSS", "softmax")
    assert outputs.predictions.logits.shape[-1] == 6
    outputs.predictions.logits[..., 5] = 99
    truths, first = outputs.targets.labels[0], outputs.noised.labels[0, :3]
    stages = [first, *outputs.predictions.logits[:, 0, :3, :5].argmax(-1)]
    figure = draw_refinement(outputs, pixels, NAMES)
    for panel, labels in zip(figure.axes, stages, strict=True):
        assert [text.get_text() for text in panel.texts] == [NAMES[x] for x in labels[labels != truths]]
        assert panel.get_title().endswith(f"{int((labels == truths).sum())} of 3 labels right")


def test_mean_iou_by_hand():
    a, b = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1]]), torch.tensor([[1.0, 0, 3, 2], [0, 0, 1, 1]])
    assert mean_iou(a, b) == pytest.approx((1 / 3 + 1) / 2)


def test_the_mask_is_the_one_rule(observe):
    outputs, _ = observe("dn_detr")
    figure = draw_mask(outputs)
    (panel,) = figure.axes
    total = 5 * 3 + 9
    expected = [
        [key < 15 and (query >= 15 or query // 3 != key // 3) for key in range(total)] for query in range(total)
    ]
    np.testing.assert_array_equal(panel.images[0].get_array(), np.array(expected))
    assert [text.get_text() for text in panel.get_xticklabels()] == [*(f"group {g}" for g in range(1, 6)), "matching"]
    outlines = [(patch.get_x(), patch.get_y(), patch.get_width()) for patch in panel.patches]
    assert outlines == [(0, 0, 3), (3, 3, 3), (6, 6, 3), (9, 9, 3), (12, 12, 3), (15, 15, 9)]
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == ["may be seen", "blocked", "one group", "matching queries"]


def test_of_many_groups_the_first_and_last_are_named(observe):
    outputs, _ = observe("dn_detr", "MODEL.DN_DETR.DENOISING.NUM_GROUPS", 30)
    (panel,) = draw_mask(outputs).axes
    assert [text.get_text() for text in panel.get_yticklabels()] == ["group 1", "group 30", "matching"]


def test_an_image_without_objects_is_drawn(toy_model):
    model = toy_model("dn_detr").eval()
    (record,) = make_batch(0)
    outputs = observe_denoising(model, record, 0)
    pixels = to_rgb(record["image"], "RGB")
    assert titles(draw_noise(outputs, pixels, NAMES, 1)) == ["group 1 of 5: 0 of 0 labels flipped"]
    assert titles(draw_refinement(outputs, pixels, NAMES))[0].endswith("nan, 0 of 0 labels right")
    draw_mask(outputs)


def test_bgr_images_are_turned():
    image = torch.arange(3)[:, None, None].expand(3, 2, 2)
    assert to_rgb(image, "BGR")[0, 0].tolist() == [2, 1, 0]
    assert to_rgb(image, "RGB")[0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("system", [*DENOISING_SYSTEMS, "mask_dino"])
def test_every_system_can_be_drawn(observe, system):
    outputs, pixels = observe(system)
    assert len(titles(draw_noise(outputs, pixels, NAMES, 2))) == 2
    assert len(titles(draw_refinement(outputs, pixels, NAMES))) == 4
    assert len(draw_mask(outputs).axes[0].patches) == outputs.noised.num_groups + 1


def test_boxes_of_models_with_masks_are_drawn_where_they_are(toy_model):
    """In pixels of the image, though they are relative to its padding."""
    model = toy_model("mask_dino").eval()
    (record,) = make_batch(3, sizes=((70, 90),), masks=True)
    outputs = observe_denoising(model, record, 0)
    pixels = to_rgb(record["image"], "RGB")
    drawn = to_pixels(outputs.denoised.boxes[0], pixels, outputs.memory)
    torch.testing.assert_close(drawn, record["instances"].gt_boxes.tensor, atol=1e-3, rtol=0)


def test_a_model_without_boxes_is_refused(toy_model):
    model = toy_model("mask2former").eval()
    with pytest.raises(ConfigError, match=naming("MaskedDecoder", "boxes")):
        observe_denoising(model, make_batch(3, masks=True)[0], 0)


@pytest.mark.parametrize("system", ["dn_deformable_detr", "dino"])
def test_the_command_writes_three_pictures(saved, system, tmp_path, capsys):
    config, weights = saved(system, True)
    arguments = ["--config-file", config, "--dataset", "three_images", "--output", str(tmp_path / "out")]
    arguments += ["--groups", "2"]
    assert visualize_denoising.main([*arguments, "--weights", weights, "--image", "5"]) == 0
    names = [f"5_{kind}.png" for kind in ("noise", "refinement", "attention_mask")]
    assert [line.split("/")[-1] for line in capsys.readouterr().out.splitlines()[-3:]] == names
    for name in names:
        picture = matplotlib.image.imread(tmp_path / "out" / name)
        assert min(picture.shape[:2]) > 250
        colours = np.unique((picture[:, :, :3] @ [65536, 256, 1] * 255).astype(int))
        assert len(colours) > (20 if "mask" in name else 200)


def test_without_weights_the_pictures_say_so(saved, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(visualize_denoising, "save", lambda figure, path: seen.append(figure.get_suptitle()) or path)
    arguments = ["--config-file", saved("dn_detr"), "--dataset", "three_images", "--output", str(tmp_path)]
    assert visualize_denoising.main(arguments) == 0
    assert seen == ["4.png, random weights: this model has learned nothing"] * 3


def test_images_are_found_by_id_then_by_position():
    records = [{"image_id": 7, "annotations": []}, {"image_id": 1, "annotations": [{}]}, {"image_id": 9}]
    assert [choose(records, wanted, "x")["image_id"] for wanted in ("9", "1", "0", None)] == [9, 1, 7, 1]
    with pytest.raises(DatasetError, match=naming("--image", 3, "x", 2)):
        choose(records, "3", "x")


@pytest.mark.parametrize(
    ("system", "arguments", "named"),
    [
        ("dab_detr", [], ["DENOISING.NAME"]),
        ("dn_detr", ["--dataset", "nothing"], ["'nothing'"]),
        ("dn_detr", ["--image", "no"], ["--image", "no"]),
        ("dn_detr", ["--weights", "no.pth"], ["--weights", "no.pth"]),
        ("dn_detr", ["--weights", "{other}"], ["{other}"]),
        ("dn_detr", ["--groups", "0"], ["--groups", 1, 0]),
        ("dn_detr", ["MODEL.DN_DETR.NUM_QUERRIES", "3"], ["MODEL.DN_DETR.NUM_QUERRIES", "MODEL.DN_DETR.NUM_QUERIES"]),
    ],
)
def test_bad_input_is_one_sentence(saved, tmp_path, capsys, system, arguments, named):
    other = saved("dn_deformable_detr", True)[1] if "{other}" in arguments else ""
    arguments, named = ([str(x).format(other=other) for x in y] for y in (arguments, named))
    command = ["--config-file", saved(system), "--dataset", "three_images", "--output", str(tmp_path / "out")]
    assert visualize_denoising.main([*command, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert naming(*named).search(error)
    assert not (tmp_path / "out").exists()


def test_a_config_without_data_asks_for_it(saved, tmp_path, capsys):
    assert visualize_denoising.main(["--config-file", saved("dn_detr"), "--output", str(tmp_path)]) == 2
    assert naming("--dataset").search(capsys.readouterr().err)
    assert visualize_denoising.main(["--config-file", str(ROOT / "no.yaml"), "--output", str(tmp_path)]) == 2
    assert naming("no.yaml").search(capsys.readouterr().err)
