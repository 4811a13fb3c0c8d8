import json
import unicodedata

import pytest
from conftest import valid_coco
from detectron2.data import DatasetCatalog, MetadataCatalog
from naming import naming
from PIL import Image

from dn_detr_d2 import ConfigError, DatasetError
from dn_detr_d2.data import load_coco_json, register_coco_json
from dn_detr_d2.data.coco_custom import class_names, load_with_categories
from dn_detr_d2.data.images import image_size


def content(**changes):
    """A valid annotation file with two images, category ids with gaps, and changes."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 20, "width": 30},
            {"id": 3, "file_name": "b.png", "height": 20, "width": 30},
        ],
        "categories": [{"id": 90, "name": "cat"}, {"id": 4, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 12},
            {"id": 2, "image_id": 7, "category_id": 4, "bbox": [5, 5, 9, 9], "segmentation": [[1, 2]], "area": 81},
        ],
    } | changes


@pytest.fixture
def write(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 20)).save(tmp_path / name)

    def make(**changes):
        path = tmp_path / "set.json"
        path.write_text(json.dumps(content(**changes)))
        return path

    return make


def annotation(**changes):
    return [{"id": 1, "image_id": 7, "category_id": 4, "bbox": [1, 2, 3, 4]} | changes]


def test_a_valid_file(write, tmp_path):
    first, second = load_coco_json(write(), tmp_path)
    assert (first["image_id"], first["annotations"]) == (3, [])  # an image without boxes stays
    assert second["file_name"] == str(tmp_path / "a.png")
    assert [(a["id"], a["category_id"], a["bbox"]) for a in second["annotations"]] == [
        (1, 1, [1.0, 2.0, 3.0, 4.0]),
        (2, 0, [5.0, 5.0, 9.0, 9.0]),  # a useless polygon does not cost the box
    ]


@pytest.mark.parametrize("ids", [(0, 1), (5, 1000000), ("b", "a"), (-1, 3)])
def test_category_ids_of_any_kind_become_contiguous(write, tmp_path, ids):
    categories = [{"id": i, "name": f"class {i}"} for i in ids]
    annotations = [{"id": n, "image_id": 7, "category_id": i, "bbox": [1, 2, 3, 4]} for n, i in enumerate(ids)]
    _, record = load_coco_json(write(categories=categories, annotations=annotations), tmp_path)
    assert [a["category_id"] for a in record["annotations"]] == [sorted(ids).index(i) for i in ids]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"images": []}, ["images"]),
        ({"categories": []}, ["categories"]),
        ({"categories": [{"id": 1}]}, ["category", "id", "name"]),
        (
            {"categories": [{"id": 1, "name": "x"}, {"id": 1, "name": "y"}]},
            ["category ids", "[1]"],
        ),
        ({"categories": [{"id": 4, "name": "x"}, {"id": 90, "name": "x"}]}, ["category names", "x"]),
        ({"annotations": annotation(category_id=5)}, ["annotation 1", "category_id", 5, "[4, 90]"]),
        ({"annotations": annotation(image_id=99)}, ["annotation 1", "image_id", 99]),
        ({"annotations": annotation(image_id="7")}, ["annotation 1", "image_id", "'7'", 7, "--fix"]),
        (
            {"annotations": annotation(id=None, category_id="4")},
            ["annotation number 0", "category_id", "'4'", 4],
        ),
        ({"annotations": annotation(bbox=None)}, ["annotation 1", "bbox", None]),
        ({"annotations": annotation(bbox=[1, 2, 3])}, ["annotation 1", "bbox", "[1, 2, 3]"]),
        ({"annotations": annotation(bbox=[1, 2, "3", 4])}, ["annotation 1", "bbox", "[1, 2, '3', 4]"]),
        ({"annotations": annotation(iscrowd="0")}, ["annotation 1", "iscrowd", "'0'"]),
        ({"annotations": annotation() * 2}, ["annotation ids", "[1]"]),
        ({"images": [{"id": 7, "file_name": x} for x in ("a.png", "b.png")]}, ["image id 7"]),
        ({"images": [{"id": 7, "file_name": "gone.png"}]}, ["none", "gone.png"]),
        ({"images": [{"id": 7}]}, ["image number 0", "file_name"]),
        ({"images": [3]}, ["image number 0", "file_name", 3]),
        ({"annotations": 3}, ["annotations", "id"]),
        ({"annotations": [{"image_id": 7, "category_id": 4, "bbox": [1, 2, 3, 4]}]}, ["annotations", "id"]),
        ({"annotations": ["x"]}, ["annotations"]),
    ],
)
def test_faults_are_named_with_file_and_record(write, tmp_path, changes, named):
    path = write(**changes)
    with pytest.raises(DatasetError, match=naming(*named)) as caught:
        load_coco_json(path, tmp_path)
    assert "set.json" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_a_file_that_is_not_an_annotation_file(tmp_path, text):
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(DatasetError, match=r"set\.json"):
        load_coco_json(tmp_path / "set.json", tmp_path)


def test_registration_is_relative_to_the_datasets_folder_and_names_classes(write, tmp_path, monkeypatch):
    write()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_coco_json("test_relative", "set.json", ".")
    register_coco_json("test_relative", "set.json", ".")
    assert class_names("test_relative") == ["dog", "cat"]
    assert MetadataCatalog.get("test_relative").thing_dataset_id_to_contiguous_id == {4: 0, 90: 1}
    assert len(DatasetCatalog.get("test_relative")) == 2


def test_a_taken_name_is_refused(write, tmp_path):
    with pytest.raises(ConfigError, match=naming("'coco_2017_train'")):
        register_coco_json("coco_2017_train", str(write()), str(tmp_path))


def test_missing_files_are_named_with_the_way_out(write, tmp_path):
    with pytest.raises(DatasetError, match=naming("nothing.json", "DETECTRON2_DATASETS")):
        register_coco_json("test_missing", str(tmp_path / "nothing.json"), str(tmp_path))
    with pytest.raises(DatasetError, match=naming("nowhere")):
        register_coco_json("test_missing", str(write()), str(tmp_path / "nowhere"))
    register_coco_json("test_missing", str(tmp_path / "nothing.json"), str(tmp_path), must_exist=False)
    assert "test_missing" not in DatasetCatalog


@pytest.mark.parametrize(("put", "given"), [("images/deep", "images"), ("images", "images/deep"), ("other", "images")])
def test_files_of_another_folder_are_found_there(tmp_path, put, given):
    """Exporters differ in whether file_name holds the folder; leaving the images out would leave out all."""
    for folder in ("images/deep", put, given):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    content = valid_coco()
    for image in content["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / put / image["file_name"])
    (tmp_path / "set.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=naming(f"they lie in {tmp_path / put}")) as caught:
        load_coco_json(tmp_path / "set.json", tmp_path / given)
    assert "--drop-bad" not in str(caught.value)


def test_an_unknown_data_set_suggests_the_nearest():
    with pytest.raises(ConfigError, match=naming("'shape_train'", "'shapes_train'")):
        class_names("shape_train")


def test_a_class_name_with_half_a_surrogate_pair_can_be_written(tmp_path):
    """An emoji that was cut in two; TensorBoard and JSON in UTF-8 cannot hold it, and a training ended there."""
    content = valid_coco(categories=[{"id": 1, "name": "cat \ud83d"}, {"id": 2, "name": "dog"}])
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 20)).save(tmp_path / name)
    (tmp_path / "set.json").write_text(json.dumps(content))
    _, categories = load_with_categories(tmp_path / "set.json", tmp_path)
    assert list(categories.values()) == ["cat \\ud83d", "dog"]
    assert all(name.encode() for name in categories.values())


def test_an_image_that_is_listed_twice_with_the_same_values_is_one(write, tmp_path, caplog):
    images = content()["images"]
    path = write(images=[images[0], dict(images[0]), images[1], images[0]])
    with caplog.at_level("INFO", "dn_detr_d2"):
        records = load_coco_json(path, tmp_path)
    assert [record["image_id"] for record in records] == sorted(image["id"] for image in images)
    assert records == load_coco_json(write(), tmp_path)
    assert naming(2, "listed twice").search(caplog.text)


def test_annotations_of_null_are_none(write, tmp_path):
    assert all("annotations" not in record for record in load_coco_json(write(annotations=None), tmp_path))


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_are_found_in_either_spelling(write, tmp_path, forms):
    """macOS writes them as characters of their own, so that an archive or a JSON file from there may have the other one."""
    listed, written = (unicodedata.normalize(form, "éclair.png") for form in forms)
    assert listed != written
    Image.new("RGB", (30, 20)).save(tmp_path / written)
    [record] = load_coco_json(write(images=[{"id": 7, "file_name": listed}], annotations=annotation()), tmp_path)
    assert record["file_name"] == str(tmp_path / written)


def test_a_link_that_leads_out_is_called_so(write, tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    Image.new("RGB", (30, 20)).save(outside / "real.png")
    (inside / "a.png").symlink_to(outside / "real.png")
    path = write(images=[{"id": 7, "file_name": "a.png"}], annotations=annotation())
    with pytest.raises(DatasetError, match=naming("'a.png'", "link", outside / "real.png", inside)):
        load_coco_json(path, inside)


def test_a_photograph_of_108_megapixels_is_no_bomb(tmp_path):
    Image.new("1", (12000, 9000)).save(tmp_path / "a.png")
    assert image_size(str(tmp_path / "a.png")) == (9000, 12000)
