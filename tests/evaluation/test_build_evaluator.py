"""What a data set is evaluated by, and which result chooses the best checkpoint."""

from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from naming import naming
from toy_training import make_cfg

from dn_detr_d2 import DatasetError
from dn_detr_d2.engine import Trainer
from dn_detr_d2.engine.trainer import best_metrics
from dn_detr_d2.evaluation import (
    PanopticEvaluator,
    SemanticEvaluator,
    TolerantCOCOEvaluator,
    build_evaluator,
    inference_folder,
)
from dn_detr_d2.report.build import Training

OUTPUTS = "MODEL.DN_DETR.MASK.OUTPUTS"
BOX = {"id": 3, "bbox": [1, 2, 3, 4], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
KINDS = {  # fields of the records
    "instances": {"annotations": [BOX | {"segmentation": [[1, 2, 4, 2, 4, 6]]}]},
    "panoptic": {"annotations": [BOX], "pan_seg_file_name": "a.png", "segments_info": [BOX]},
    "semantic": {"sem_seg_file_name": "a.png"},
}


@pytest.fixture
def registered(tmp_path):
    names = []

    def make(kind):
        names.append(f"{kind}_{tmp_path.name}")
        record = {"file_name": "a.jpg", "image_id": 1, "height": 20, "width": 30} | KINDS[kind]
        DatasetCatalog.register(names[-1], lambda: [record])
        classes = list("abcde")
        metadata = {"stuff_classes": classes} | ({} if kind == "semantic" else {"thing_classes": classes})
        if kind == "panoptic":
            metadata |= {"thing_dataset_id_to_contiguous_id": {4: 0, 7: 1}, "panoptic_json": "x.json"}
            metadata |= {"stuff_dataset_id_to_contiguous_id": {5: 2, 6: 3, 9: 4}}
        MetadataCatalog.get(names[-1]).set(**metadata)
        return names[-1]

    yield make
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


EVERYTHING = ["instances", "panoptic_seg", "sem_seg"]


@pytest.mark.parametrize(("system", "outputs", "kind", "expected"), [
    ("dino", EVERYTHING, "instances", [TolerantCOCOEvaluator]),
    ("mask_dino", EVERYTHING, "instances", [TolerantCOCOEvaluator]),
    ("mask2former", ["sem_seg", "instances"], "panoptic", [SemanticEvaluator, TolerantCOCOEvaluator]),
    ("mask2former", EVERYTHING, "panoptic", [TolerantCOCOEvaluator, PanopticEvaluator, SemanticEvaluator]),
    ("mask2former", EVERYTHING, "semantic", [SemanticEvaluator]),
])  # fmt: skip
def test_what_the_model_gives_and_the_data_set_has(toy_cfg, registered, system, outputs, kind, expected):
    found = Trainer.build_evaluator(toy_cfg(system, OUTPUTS, outputs), registered(kind))
    found = found._evaluators if isinstance(found, DatasetEvaluators) else [found]
    assert [type(x) for x in found] == expected
    for one in found:
        if isinstance(one, TolerantCOCOEvaluator):
            assert one._tasks == (("bbox",) if system == "dino" else ("bbox", "segm"))
            assert one._only == ([1, 2] if kind == "panoptic" else [])  # of things
            assert one._category_ids == ([4, 7, 5, 6, 9] if kind == "panoptic" else [0, 1, 2, 3, 4])


def test_a_data_set_with_nothing_of_it_is_refused(toy_cfg, registered):
    name = registered("instances")
    with pytest.raises(DatasetError, match=naming(name, OUTPUTS)):
        Trainer.build_evaluator(toy_cfg("mask2former", OUTPUTS, ["panoptic_seg"]), name)


@pytest.mark.parametrize(("system", "outputs", "expected"), [
    ("dino", EVERYTHING, "bbox/AP"),
    ("mask_dino", EVERYTHING, "bbox/AP"),
    ("mask2former", EVERYTHING, "segm/AP"),  # which has no boxes
    ("mask_dino", ["sem_seg", "panoptic_seg"], "panoptic_seg/PQ"),
    ("mask2former", ["sem_seg"], "sem_seg/mIoU"),
])  # fmt: skip
def test_the_result_that_chooses_the_best_checkpoint(toy_cfg, system, outputs, expected):
    cfg = toy_cfg(system, OUTPUTS, outputs)
    assert best_metrics(cfg) == []
    cfg.DATASETS.TEST = ("one",)
    assert best_metrics(cfg) == [expected]
    cfg.DATASETS.TEST, cfg.MODEL_EMA.ENABLED = ("one", "two"), True
    assert best_metrics(cfg) == [f"one/{expected}", f"ema/one/{expected}"]


def test_what_cannot_be_evaluated_ends_no_training_later(tmp_path, registered):
    name = registered("semantic")
    cfg = make_cfg(tmp_path, "DATASETS.TEST", (name,), config="mask2former_dn_R50_instance_12ep")
    with pytest.raises(DatasetError, match=naming(name, OUTPUTS)):
        Trainer(cfg)


@pytest.mark.parametrize(("sets", "folders"), [
    (("shapes_val",), ["inference"]), (("shapes_val", "user/set"), ["inference/shapes_val", "inference/user_set"]),
])  # fmt: skip
def test_each_of_several_test_sets_has_a_folder_of_its_own(toy_cfg, tmp_path, sets, folders):
    """Or the files of all but the last would be overwritten."""
    cfg = toy_cfg("dn_detr", "OUTPUT_DIR", str(tmp_path), "MODEL.DN_DETR.NUM_CLASSES", 3)
    cfg.DATASETS.TEST = sets
    assert [Path(inference_folder(cfg, name)).relative_to(tmp_path).as_posix() for name in sets] == folders
    assert build_evaluator(cfg, "shapes_val")._output_dir == str(tmp_path / folders[0])
    assert Training(cfg, tmp_path, None).predictions == tmp_path / folders[0]  # of the first, as the best checkpoint
