"""A training that is resumed keeps the order of its classes, whatever the annotation file now says."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from naming import naming
from toy_training import make_cfg, train

from dn_detr_d2 import CheckpointError, setup_cfg

NAMES = ["circle", "square", "triangle"]


def write(folder, names):
    """Four pictures with an object each, whose categories come in this order."""
    from PIL import Image

    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 0, 0)).save(folder / f"{i}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 64, "width": 64} for i in range(4)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": i,
                "category_id": names.index(NAMES[i % min(3, len(names))]),
                "bbox": [9, 9, 30, 30],
            }
            for i in range(4)
        ],
    }
    (folder / "a.json").write_text(json.dumps(content))


@pytest.fixture
def config(tmp_path):
    """config(names, *opts) -> the config of a training on a file that has just been written."""
    name = f"resumed_{tmp_path.name}"

    def forget():
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)

    def make(names, *opts, file=None):
        forget()
        write(tmp_path, names)
        sets = ["DATASETS.COCO_JSON", [[name, str(tmp_path / "a.json"), str(tmp_path)]], "DATASETS.TRAIN", (name,)]
        if file:
            return setup_cfg(str(file), [*sets, *opts])
        return make_cfg(tmp_path / "out", *sets, *opts)

    yield make
    forget()


@pytest.mark.parametrize("names", [NAMES[::-1], [*NAMES, "star"], NAMES[:2]])
def test_a_resume_with_other_classes_is_refused(config, names):
    train(config(NAMES, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ()))
    cfg = config(names, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", ())
    with pytest.raises(CheckpointError, match=naming(3, "'circle', 'square', 'triangle'")):
        train(cfg, resume=True)


def test_the_way_out_keeps_the_order(config, tmp_path):
    first = config(NAMES, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ())
    train(first)
    (tmp_path / "out" / "config.yaml").write_text(first.dump())
    file = tmp_path / "out" / "config.yaml"
    cfg = config(NAMES[::-1], "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (), file=file)
    assert list(cfg.MODEL.DN_DETR.CLASS_NAMES) == NAMES
    trainer = train(cfg, resume=True)
    assert trainer.iter == 4
    batch = trainer._trainer.data_loader.dataset
    labels = {record["file_name"][-5]: record["annotations"][0]["category_id"] for record in batch.records}
    assert labels == {"0": 0, "1": 1, "2": 2, "3": 0}  # as NAMES counts, not as the file does
