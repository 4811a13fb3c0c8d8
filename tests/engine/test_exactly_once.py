"""An evaluation sees every image once, and its result does not depend on how many processes share the images."""

import json

import pytest
import torch
from conftest import ROOT, SYSTEMS, TOY
from naming import naming
from PIL import Image
from ranks import on_ranks

from dn_detr_d2 import DatasetError, setup_cfg
from dn_detr_d2.data import build_test_loader
from dn_detr_d2.engine import TolerantCOCOEvaluator, Trainer, evaluate

SIZES = [(48, 64), (64, 48), (48, 64), (33, 57), (64, 64), (56, 40), (41, 60)]  # (height, width) of seven images


def make_cfg(folder, images, *overrides):
    """The config of an evaluation on the first so many images."""
    name = f"once_{images}_{folder.name}"
    row = [[name, str(folder / f"{images}.json"), str(folder)]]
    return setup_cfg(
        str(ROOT / "configs" / f"{SYSTEMS['dn_deformable_detr']}.yaml"),
        [*TOY, "INPUT.MIN_SIZE_TEST", 48, "INPUT.MAX_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0,
         "DATASETS.COCO_JSON", row, "DATASETS.TEST", (name,), *overrides],
        splits=("TEST",),
    )  # fmt: skip


def evaluated(folder, results):
    """Evaluates seven images, and two images, in as many processes as there are; rank 0 writes both APs."""
    torch.set_num_threads(1)
    found = []
    for images in (7, 2):
        options = ["MODEL.WEIGHTS", str(folder / "weights.pth"), "OUTPUT_DIR", str(results / str(images))]
        found.append(evaluate(make_cfg(folder, images, *options)))
    if found[0]:
        (results / "ap.json").write_text(json.dumps(found))


@pytest.fixture
def folder(tmp_path):
    """Images with a box each, annotation files of seven and of two of them."""
    for i, (height, width) in enumerate(SIZES):
        noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / f"{i}.png")
    images = [{"id": 9 - i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(SIZES)]
    boxes = [{"id": i, "image_id": 9 - i, "category_id": 1 + i % 5, "bbox": [2, 3, 20, 20]} for i in range(7)]
    categories = [{"id": 1 + i, "name": f"class {i}"} for i in range(5)]
    for count in (7, 2):
        content = {"images": images[:count], "annotations": boxes[:count], "categories": categories}
        (tmp_path / f"{count}.json").write_text(json.dumps(content))
    return tmp_path


def test_one_two_and_three_processes_write_the_same_predictions(folder):
    """Seven images can be shared evenly by neither; of two images one of three processes gets none."""
    model = Trainer.build_model(make_cfg(folder, 7))
    torch.save({"model": model.state_dict(), "class_names": [f"class {i}" for i in range(5)]}, folder / "weights.pth")
    written = []
    for processes in (1, 2, 3):
        results = folder / f"by_{processes}"
        for images in ("7", "2"):
            (results / images).mkdir(parents=True)
        if processes == 1:
            evaluated(folder, results)
        else:
            on_ranks(evaluated, folder, results, ranks=processes)
        files = [results / n / "inference" / "coco_instances_results.json" for n in ("7", "2")]
        written.append([*(file.read_bytes() for file in files), (results / "ap.json").read_text()])
    assert written[0] == written[1] == written[2]
    seen = [entry["image_id"] for entry in json.loads(written[0][0])]
    assert sorted(set(seen)) == list(range(3, 10))


def test_images_evaluated_two_or_four_at_a_time_are_detected_as_one_by_one(folder):
    """Seven images of six sizes, and one size that comes twice; the last batch is not full."""
    model = Trainer.build_model(make_cfg(folder, 7))
    found = []
    for size in (1, 2, 4):
        cfg = make_cfg(folder, 7, "TEST.IMS_PER_BATCH", size, "OUTPUT_DIR", str(folder / f"batches_of_{size}"))
        assert next(len(batch) for batch in build_test_loader(cfg, cfg.DATASETS.TEST[0])) == size
        Trainer.test(cfg, model)
        found.append(json.loads((folder / f"batches_of_{size}/inference/coco_instances_results.json").read_text()))
    alone, *together = found
    assert {x["image_id"] for x in alone} == set(range(3, 10))
    for batches in together:
        for a, b in zip(alone, batches, strict=True):
            assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
            assert [a["score"], *a["bbox"]] == pytest.approx([b["score"], *b["bbox"]], abs=1e-5, rel=1e-5)


@pytest.mark.parametrize(("seen", "named"), [
    ([9], [1, "[8]", 0]),
    ([9, 8, 8], [0, "[]", 1, "[8]"]),
    ([9, 8, 77], [1, "[77]"]),
])  # fmt: skip
def test_a_loader_that_drops_or_doubles_an_image_is_found(folder, seen, named):
    cfg = make_cfg(folder, 2)
    evaluator = TolerantCOCOEvaluator(cfg.DATASETS.TEST[0], tasks=("bbox",), output_dir=None)
    evaluator.reset()
    evaluator._predictions = [{"image_id": image, "instances": []} for image in seen]
    with pytest.raises(DatasetError, match=naming(*named)):
        evaluator.evaluate()
