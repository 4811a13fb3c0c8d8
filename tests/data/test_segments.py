"""Panoptic and semantic sets: each segment, or each class, is an object with mask and box."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import builtin
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from naming import naming
from PIL import Image

from dn_detr_d2 import ConfigError, DatasetError, setup_cfg
from dn_detr_d2.data import build_probe_loader, build_train_loader, read_panoptic_png, records_of, shapes_segments
from dn_detr_d2.data.mapper import AnnotatedDatasetMapper
from dn_detr_d2.data.panoptic import load_panoptic, panoptic_map
from dn_detr_d2.data.registered import known_things
from dn_detr_d2.data.segment_map import SegmentMap
from dn_detr_d2.data.semantic import load_semantic, read_semantic_map
from dn_detr_d2.evaluation import PanopticEvaluator, SemanticEvaluator

MASKS = ["MODEL.DN_DETR.MASK.ENABLED", True, "INPUT.MASK_FORMAT", "bitmask", "MODEL.DEVICE", "cpu"]
IDS = np.array([[7, 7, 7, 70000], [300, 300, 0, 70000], [300, 300, 9, 9]])
BOXES = {7: [0, 0, 3, 1], 70000: [3, 0, 1, 2], 300: [0, 1, 2, 2], 9: [2, 2, 2, 1]}
CLASSES = {7: 200, 70000: 3, 300: 1, 9: 3}  # stuff, thing, thing, crowd of things
CATEGORIES = [{"id": 200, "name": "sky", "isthing": 0}, {"id": 3, "name": "car", "isthing": 1}]
CATEGORIES += [{"id": 1, "name": "person", "isthing": 1}]


def rgb(ids):
    return Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], 2).astype(np.uint8))


def segments_info():
    return [
        {"id": i, "category_id": CLASSES[i], "bbox": BOXES[i], "area": int((i == IDS).sum()), "iscrowd": int(i == 9)}
        for i in BOXES
    ]


def write(folder, ids=IDS, categories=CATEGORIES, size=(4, 3), **changes):
    """A panoptic set of one image; returns (json, png folder, image folder)."""
    for name in ("images", "pngs"):
        (folder / name).mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size, (50, 60, 70)).save(folder / "images" / "a.jpg")
    rgb(ids).save(folder / "pngs" / "a.png")
    annotation = {"image_id": 5, "file_name": "a.png", "segments_info": segments_info()}
    images = [{"id": 5, "file_name": "a.jpg", "width": size[0], "height": size[1]}]
    content = {"images": images, "annotations": [annotation], "categories": categories} | changes
    (folder / "panoptic.json").write_text(json.dumps(content))
    return folder / "panoptic.json", folder / "pngs", folder / "images"


@pytest.fixture
def mapper():
    """AnnotatedDatasetMapper that keeps the size of images."""
    cfg = setup_cfg("", [*MASKS, "MODEL.DN_DETR.NUM_CLASSES", 3, "DATASETS.TRAIN", (), "DATASETS.TEST", ()], splits=())
    cfg.INPUT.MIN_SIZE_TEST = 0
    return AnnotatedDatasetMapper(cfg)


def test_ids_are_read_from_three_channels(tmp_path):
    rgb(IDS).save(tmp_path / "a.png")
    found = read_panoptic_png(str(tmp_path / "a.png"))
    assert found.dtype == np.int32
    assert np.array_equal(found, IDS)


def test_every_segment_but_crowds_is_an_object(tmp_path, mapper):
    """Things come first in the numbers of classes: person 0, car 1, sky 2."""
    [record], metadata = load_panoptic(*write(tmp_path))
    assert metadata["thing_classes"] == ["person", "car", "sky"]
    assert metadata["thing_dataset_id_to_contiguous_id"] == {1: 0, 3: 1}
    assert metadata["stuff_dataset_id_to_contiguous_id"] == {200: 2}
    assert [(x["category_id"], x["isthing"]) for x in record["segments_info"]] == [
        (2, False),
        (1, True),
        (0, True),
        (1, True),
    ]
    objects = mapper(record)["instances"]
    assert objects.gt_classes.tolist() == [2, 1, 0]
    assert objects.gt_index.tolist() == [0, 1, 2]
    for mask, box, number in zip(
        objects.gt_masks.tensor, objects.gt_boxes.tensor.tolist(), (7, 70000, 300), strict=True
    ):
        assert np.array_equal(mask.numpy(), number == IDS)
        x, y, w, h = BOXES[number]
        assert box == [x, y, x + w, y + h]


def test_a_detector_without_masks_takes_the_boxes_of_segments(tmp_path, mapper):
    [record], _ = load_panoptic(*write(tmp_path))
    mapper.masks = None
    objects = mapper(record)["instances"]
    assert not objects.has("gt_masks")
    assert len(objects) == 3


def test_more_segments_than_a_byte_counts(tmp_path):
    ids = np.arange(1, 401).reshape(20, 20)
    rgb(ids).save(tmp_path / "a.png")
    record = {
        "pan_seg_file_name": str(tmp_path / "a.png"),
        "file_name": "a",
        "annotations": [{"id": int(i)} for i in range(1, 401)],
    }
    found = panoptic_map(record, (20, 20), [(i, i % 7) for i in range(400)])
    larger = T.ResizeTransform(20, 20, 40, 60).apply_segmentation(found.pixels)
    assert np.array_equal(larger, found.pixels.repeat(2, 0).repeat(3, 1))
    objects = found.instances(found.pixels)
    assert len(objects) == 400
    assert torch.equal(objects.gt_masks.tensor.flatten(1).long().argmax(1), torch.arange(400))
    assert objects.gt_classes.tolist() == [i % 7 for i in range(400)]


def test_what_is_padded_belongs_to_no_object():
    objects = SegmentMap(np.zeros((1, 1)), [0], [2], [0]).instances(np.array([[0, 255], [255, 255]], np.uint8))
    assert objects.gt_masks.tensor.tolist() == [[[True, False], [False, False]]]
    assert len(SegmentMap(np.zeros((1, 1)), [3], [2], [0]).instances(np.full((2, 5), 255, np.uint8)).gt_masks) == 0


def test_a_png_of_another_size_is_named(tmp_path, mapper):
    [record], _ = load_panoptic(*write(tmp_path, ids=IDS.T))
    with pytest.raises(DatasetError, match=naming("a.png", "3x4", "4x3")):
        mapper(record)


@pytest.mark.parametrize(("old", "new", "named"), [(300, 301, (300,)), (0, 12, (12,))])
def test_ids_of_only_one_of_png_and_json_are_named(tmp_path, mapper, old, new, named):
    [record], _ = load_panoptic(*write(tmp_path, ids=np.where(old == IDS, new, IDS)))
    with pytest.raises(DatasetError, match=naming("a.png", "segments_info", *named)):
        mapper(record)


def test_a_damaged_png_is_named(tmp_path, mapper):
    [record], _ = load_panoptic(*write(tmp_path))
    file = tmp_path / "pngs" / "a.png"
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 1
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=naming("a.png")):
        mapper(record)


def test_images_without_an_annotation_are_left_out_and_counted(tmp_path, caplog):
    image = {"id": 5, "file_name": "a.jpg", "width": 4, "height": 3}
    records, _ = load_panoptic(*write(tmp_path, images=[image, image | {"id": 6}]))
    assert [record["image_id"] for record in records] == [5]
    assert naming(1, "left out").search(caplog.text)


def test_a_png_without_colours_is_named(tmp_path, mapper):
    [record], _ = load_panoptic(*write(tmp_path))
    Image.fromarray(IDS.astype(np.uint8)).save(tmp_path / "pngs" / "a.png")
    with pytest.raises(DatasetError, match=naming("a.png", "mode L")):
        mapper(record)


def annotation(**changes):
    return {"image_id": 5, "file_name": "a.png", "segments_info": segments_info()} | changes


def segment(**changes):
    return [annotation(segments_info=[segments_info()[0] | changes])]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"annotations": [annotation(image_id=6)]}, ("image_id 6",)),
        ({"annotations": [{"id": 1, "image_id": 5, "bbox": [0, 0, 1, 1]}]}, ("segments_info", "panoptic")),
        ({"annotations": [annotation(), annotation()]}, ("image 5",)),
        ({"annotations": [annotation(file_name="b.png")]}, ("b.png",)),
        ({"annotations": [annotation(file_name="../images/a.jpg")]}, ("a.jpg",)),
        ({"annotations": [annotation(segments_info=segments_info()[:1] * 2)]}, ("id 7",)),
        ({"annotations": segment(id=0)}, ("id 0",)),
        ({"annotations": segment(id=256**3)}, (256**3 - 1,)),
        ({"annotations": segment(category_id=2)}, ("category_id 2",)),
        ({"annotations": segment(iscrowd="0")}, ("iscrowd",)),
        ({"annotations": segment(bbox=None)}, ("bbox",)),
        ({"annotations": []}, ("annotations",)),
        ({"categories": [{"id": 1, "name": "person"}]}, ("category 1", "isthing")),
        ({"images": []}, ("images",)),
    ],
)
def test_faults_of_the_file_are_named(tmp_path, changes, named):
    with pytest.raises(DatasetError, match=naming("panoptic", *named)):
        load_panoptic(*write(tmp_path, **changes))


@pytest.fixture
def catalog(monkeypatch):
    """Detectron2's catalogs, to be filled by a test."""
    monkeypatch.setattr(DatasetCatalog, "data", {})
    monkeypatch.setattr(MetadataCatalog, "data", {})


def train_options(name, aug="lsj"):
    options = ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0]
    options += ["SOLVER.IMS_PER_BATCH", 1, "INPUT.AUGMENTATION", aug, "INPUT.IMAGE_SIZE", 64]
    options += ["INPUT.MIN_SIZE_TRAIN", (32,), "INPUT.MIN_SCALE", 1.0, "INPUT.MAX_SCALE", 1.0]
    return [*MASKS, *options]


def test_a_panoptic_set_of_detectron2(tmp_path, catalog):
    builtin.register_all_coco(str(tmp_path))
    name = "coco_2017_val_panoptic"
    json_file, pngs, images = write(tmp_path / "files", categories=COCO_CATEGORIES)
    metadata = MetadataCatalog.get(name)
    for path, made in (
        (metadata.panoptic_json, json_file),
        (metadata.panoptic_root, pngs),
        (metadata.image_root, images),
    ):
        tmp_path.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
        made.rename(path)
    theirs, ours = DatasetCatalog.get(name), records_of(name)
    for record, other in zip(ours, theirs, strict=True):
        for key in ("file_name", "image_id", "pan_seg_file_name"):
            assert record[key] == other[key]
        for mine, yours in zip(record["segments_info"], other["segments_info"], strict=True):
            assert mine.items() <= yours.items()
    assert known_things(name) == list(range(80))
    cfg = setup_cfg("", train_options(name))
    node = cfg.MODEL.DN_DETR
    assert (133, list(range(80))) == (node.NUM_CLASSES, node.MASK.THING_CLASSES)
    assert node.CLASS_NAMES[132] == COCO_CATEGORIES[-1]["name"]
    (image,) = next(iter(build_train_loader(cfg)))
    objects = image["instances"]
    assert objects.gt_masks.tensor.shape == (3, 64, 64)
    names = [node.CLASS_NAMES[i] for i in objects.gt_classes.tolist()]
    assert names == ["rug-merged", "car", "person"]
    content = json.loads(Path(metadata.panoptic_json).read_bytes())
    content["categories"][0] |= {"name": "human"}
    Path(metadata.panoptic_json).write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=naming(name, "DATASETS.COCO_PANOPTIC")):
        records_of(name)


def test_a_panoptic_set_of_the_config(tmp_path, catalog):
    files = list(map(str, write(tmp_path)))
    listed = ["DATASETS.COCO_PANOPTIC", [["test_own_panoptic", *files]]]
    cfg = setup_cfg("", [*train_options("test_own_panoptic"), *listed])
    assert cfg.MODEL.DN_DETR.CLASS_NAMES == ["person", "car", "sky"]
    assert cfg.MODEL.DN_DETR.MASK.THING_CLASSES == [0, 1]
    metadata = MetadataCatalog.get("test_own_panoptic")
    assert (metadata.evaluator_type, metadata.ignore_label, metadata.label_divisor) == ("coco_panoptic_seg", 255, 1000)
    (image,) = next(iter(build_probe_loader(cfg, "test_own_panoptic")))
    assert len(image["instances"]) == 3
    with pytest.raises(ConfigError, match=naming("MODEL.DN_DETR.MASK.THING_CLASSES", 3)):
        setup_cfg("", [*train_options("test_own_panoptic"), *listed, "MODEL.DN_DETR.MASK.THING_CLASSES", [3]])
    with pytest.raises(ConfigError, match=naming("DATASETS.COCO_PANOPTIC", "panoptic json")):
        setup_cfg("", [*train_options("test_own_panoptic"), listed[0], [["x", files[0]]]])
    with pytest.raises(ConfigError, match=naming("DATASETS.COCO_PANOPTIC", "test_own_panoptic")):
        setup_cfg(
            "", [*train_options("test_own_panoptic"), listed[0], [["test_own_panoptic", files[0], files[2], files[2]]]]
        )


LABELS = np.array([[0, 0, 2, 2], [0, 255, 255, 2], [1, 1, 1, 1]], np.uint8)


def write_semantic(folder, labels=LABELS, image="a.jpg"):
    for name in ("images", "labels"):
        (folder / name).mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (4, 3), (50, 60, 70)).save(folder / "images" / image)
    (labels if isinstance(labels, Image.Image) else Image.fromarray(labels)).save(folder / "labels" / "a.png")
    return folder / "images", folder / "labels"


def test_every_class_of_a_semantic_map_is_an_object(tmp_path, mapper):
    [record] = load_semantic(*write_semantic(tmp_path))
    objects = mapper(record)["instances"]
    assert objects.gt_classes.tolist() == objects.gt_index.tolist() == [0, 1, 2]
    for label, mask in enumerate(objects.gt_masks.tensor.numpy()):
        assert np.array_equal(mask, label == LABELS)
    assert objects.gt_boxes.tensor.tolist() == [[0, 0, 2, 2], [0, 2, 4, 3], [2, 0, 4, 2]]


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (np.where(LABELS == 2, 3, LABELS).astype(np.uint8), (3, "MODEL.DN_DETR.NUM_CLASSES")),
        (LABELS.T.copy(), ("3x4", "4x3")),
        (Image.new("RGB", (4, 3)), ("mode RGB",)),
    ],
)
def test_a_semantic_map_that_cannot_be_used_is_named(tmp_path, mapper, labels, named):
    [record] = load_semantic(*write_semantic(tmp_path, labels))
    with pytest.raises(DatasetError, match=naming("a.png", *named)):
        mapper(record)


@pytest.mark.parametrize("change", ["floats", "crowd", "sizes", "stranger", "fork", "twin", "repeat"])
def test_a_panoptic_file_may_be_written_as_a_detection_file_may(tmp_path, change):
    """What means the same is read as the same."""
    expected, _ = load_panoptic(*write(tmp_path / "as_it_should"))
    files = write(tmp_path / "as_it_is")
    content = json.loads(files[0].read_text())
    [annotation], [image] = content["annotations"], content["images"]
    if change == "floats":
        image["id"] = annotation["image_id"] = 5.0
        annotation["segments_info"] = [x | {k: float(x[k]) for k in ("id", "category_id")} for x in segments_info()]
    elif change == "crowd":
        annotation["segments_info"] = [x | {"iscrowd": bool(x["iscrowd"]) or None} for x in segments_info()]
    elif change == "sizes":
        image |= {"width": -1, "height": None}
    elif change == "stranger":
        content["annotations"].append({"image_id": 99, "file_name": "b.png", "segments_info": []})
    elif change == "fork":
        content["images"].append({"id": 9, "file_name": "._a.jpg"})
    elif change == "twin":
        content["categories"].append({"id": 77, "name": "car", "isthing": 1})
    else:
        content["images"].append(dict(image))
    files[0].write_text(json.dumps(content))
    found, _ = load_panoptic(*files)
    same = ("image_id", "annotations", "segments_info")
    assert [[record[key] for key in same] for record in found] == [[record[key] for key in same] for record in expected]


def test_semantic_sets_have_subfolders_and_no_hidden_files(tmp_path):
    """As Cityscapes has them, one a city, and as macOS leaves its ._ files in archives."""
    images, maps = write_semantic(tmp_path)
    for folder, name in ((images, "._a.jpg"), (maps, "._a.png")):
        (folder / name).write_bytes(b"macOS")
    for city in ("bonn", "ulm"):
        for folder, name in ((images, "a.jpg"), (maps, "a.png")):
            (folder / city).mkdir()
            shutil.copy(folder / name, folder / city / name)
    found = load_semantic(images, maps)
    assert [record["image_id"] for record in found] == ["a", "bonn/a", "ulm/a"]
    assert found[1]["file_name"] == str(images / "bonn" / "a.jpg")
    assert found[1]["sem_seg_file_name"] == str(maps / "bonn" / "a.png")


def test_images_and_maps_are_paired_by_name(tmp_path, caplog):
    folders = write_semantic(tmp_path)
    write_semantic(tmp_path, image="b.jpg")
    assert [record["image_id"] for record in load_semantic(*folders)] == ["a"]
    assert naming(1, "semantic").search(caplog.text)
    write_semantic(tmp_path, image="a.png")
    with pytest.raises(DatasetError, match=naming("a.jpg", "a.png")):
        load_semantic(*folders)
    (folders[1] / "a.png").unlink()
    with pytest.raises(DatasetError, match=naming(3, "images")):
        load_semantic(*folders)


def write_where_detectron2_looks(name, folder):
    """The files of a semantic set that Detectron2 has registered."""
    images, labels = write_semantic(folder / "files")
    metadata = MetadataCatalog.get(name)
    for path, made in ((metadata.image_root, images), (metadata.sem_seg_root, labels)):
        folder.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
        made.rename(path)


def test_a_semantic_set_of_detectron2(tmp_path, catalog):
    builtin.register_all_ade20k(str(tmp_path))
    name = "ade20k_sem_seg_train"
    with pytest.raises(DatasetError, match=naming(name, "folder")):
        build_train_loader(setup_cfg("", train_options(name, "semantic")))
    write_where_detectron2_looks(name, tmp_path)
    for record, other in zip(records_of(name), DatasetCatalog.get(name), strict=True):
        assert other.items() <= record.items()
    cfg = setup_cfg("", train_options(name, "semantic"))
    node = cfg.MODEL.DN_DETR
    assert (node.NUM_CLASSES, node.CLASS_NAMES[:2], node.MASK.THING_CLASSES) == (150, ["wall", "building"], [])
    (image,) = next(iter(build_train_loader(cfg)))
    assert image["instances"].gt_classes.tolist() == [0, 1, 2]
    assert image["image"].shape == (3, 64, 64)


def test_the_stuff_of_coco_is_a_semantic_set(tmp_path, catalog):
    builtin.register_all_coco(str(tmp_path))
    name = "coco_2017_val_panoptic_stuffonly"
    write_where_detectron2_looks(name, tmp_path)
    cfg = setup_cfg("", train_options(name, "semantic"))
    assert (cfg.MODEL.DN_DETR.NUM_CLASSES, cfg.MODEL.DN_DETR.CLASS_NAMES[0]) == (54, "things")
    assert len(next(iter(build_train_loader(cfg)))[0]["instances"]) == 3


def test_a_semantic_set_of_the_config(tmp_path, catalog):
    folders = list(map(str, write_semantic(tmp_path)))
    (tmp_path / "names.txt").write_text("tree\nroad\ncar\n")
    listed = ["DATASETS.SEM_SEG", [["test_own_semantic", *folders, str(tmp_path / "names.txt")]]]
    cfg = setup_cfg("", [*train_options("test_own_semantic", "semantic"), *listed])
    assert cfg.MODEL.DN_DETR.CLASS_NAMES == ["tree", "road", "car"]
    assert len(next(iter(build_train_loader(cfg)))[0]["instances"]) == 3
    cfg.MODEL.DN_DETR.CLASS_NAMES = ["road", "tree", "car"]
    with pytest.raises(DatasetError, match=naming("test_own_semantic", "tree", "order")):
        build_train_loader(cfg)


def test_the_embedded_segments_are_what_can_be_seen():
    """In every tenth scene: each pixel of the png is of the topmost object, else of the ground; both variants agree."""
    plain = records_of("shapes_val", masks=True)[::10]
    panoptic, semantic = records_of("shapes_panoptic_val")[::10], records_of("shapes_sem_seg_val")[::10]
    for whole, record, other in zip(plain, panoptic, semantic, strict=True):
        assert whole["file_name"] == record["file_name"] == other["file_name"]
        ids, labels = read_panoptic_png(record["pan_seg_file_name"]), np.asarray(Image.open(other["sem_seg_file_name"]))
        info = {x["id"]: x for x in record["segments_info"]}
        assert {*np.unique(ids).tolist()} == set(info)
        assert sum(x["isthing"] for x in info.values()) == len(whole["annotations"])
        for number, x in info.items():
            assert (labels[ids == number] == x["category_id"]).all()
            assert x["area"] == (ids == number).sum()
            assert x["isthing"] == (number != shapes_segments.GROUND_ID) == (x["category_id"] < 3)
        boxes = {x["id"]: x["bbox"] for x in record["annotations"]}
        for i, x in enumerate(whole["annotations"], 1):
            seen, (left, top, width, height) = boxes[i * shapes_segments.STEP], x["bbox"]
            assert left <= seen[0]
            assert seen[0] + seen[2] <= left + width
            assert top <= seen[1]
            assert seen[1] + seen[3] <= top + height


def test_perfect_predictions_of_the_embedded_sets_score_100():
    """The records hold what the evaluators need."""
    names, (things, stuff) = list(shapes_segments.CLASSES), ([0, 1, 2], [3])
    panoptic, semantic = records_of("shapes_panoptic_val")[:12], records_of("shapes_sem_seg_val")[:12]
    judges = PanopticEvaluator(panoptic, names, things), SemanticEvaluator(semantic, names)
    judges[1].reset()
    for record, other in zip(panoptic, semantic, strict=True):
        ids, labels = read_panoptic_png(record["pan_seg_file_name"]), read_semantic_map(other["sem_seg_file_name"])
        segments = [{key: x[key] for key in ("id", "category_id", "isthing")} for x in record["segments_info"]]
        judges[0].process([record], [{"panoptic_seg": (torch.from_numpy(ids), segments)}])
        judges[1].process([other], [{"sem_seg": torch.from_numpy(labels == np.arange(4)[:, None, None]).float()}])
        assert {x["category_id"] for x in segments if not x["isthing"]} == set(stuff)
    assert judges[0].evaluate()["panoptic_seg"]["PQ"] == pytest.approx(100)
    assert judges[1].evaluate()["sem_seg"]["mIoU"] == pytest.approx(100)
