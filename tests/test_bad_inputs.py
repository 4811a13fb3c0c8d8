"""Inputs that somebody has got wrong, one a row: each is refused with the file, the record and the value.

More rows of the same kind stand where their door is tested: tests/test_security.py (47 hostile files),
config/test_config.py, test_train_net.py, checkpoint/test_checkpoint.py, data/test_check.py, data/test_coco_custom.py;
docs/reliability.md counts them.
"""

import json
import struct
import zlib

import numpy as np
import pytest
from conftest import valid_coco
from naming import naming
from PIL import Image

from dn_detr_d2 import DatasetError
from dn_detr_d2.data import DetrDatasetMapper, load_coco_json, read_image
from dn_detr_d2.predictor import Predictor

IMAGE = {"id": 1, "file_name": "a.png", "width": 30, "height": 20}
TEXT = json.dumps(valid_coco())

ANNOTATIONS = [
    (TEXT.replace('"bbox": [1, 2', '"bbox": [9, 9, 9, 9], "bbox": [1, 2'), ["'bbox'"]),
    (TEXT.replace('"images"', '"annotations": [], "images"', 1), ["'annotations'"]),
    (TEXT.replace('"id": 1', '"id": 2, "id": 1', 1), ["'id'"]),
    (valid_coco(images=[IMAGE | {"width": "30"}]), ["image 1", "width", "'30'"]),
    (valid_coco(images=[IMAGE | {"height": 19.5}]), ["image 1", "height", 19.5]),
    (valid_coco(images=[IMAGE | {"height": -20}]), ["image 1", "height", -20]),
    (valid_coco(images=[IMAGE | {"height": "0"}]), ["image 1", "height", "'0'"]),
    (valid_coco(images=[IMAGE | {"width": True}]), ["image 1", "width", True]),
    (valid_coco(images=[IMAGE | {"width": float("nan")}]), ["image 1", "width", "nan"]),
    (valid_coco(images=[IMAGE | {"width": [30]}]), ["image 1", "width", "[30]"]),
    (valid_coco(images=[IMAGE | {"id": 1.5}]), ["image number 0", "id"]),
    (valid_coco(images={"1": IMAGE}), ["images"]),
    (
        valid_coco(annotations=[{"image_id": 1}]),
        ["annotation number 0", "id"],
    ),
    (valid_coco(annotations=[{"id": 1.5}]), ["annotation number 0", "{'id': 1.5}"]),
    (valid_coco(annotations={"id": 1}), ["annotations", "{'id': 1}"]),
    (valid_coco(categories=[{"id": 1, "name": "x"}, 7]), ["category number 1", "id", "name", 7]),
    (valid_coco(categories=[{"id": 1, "name": None}]), ["category number 0", "id", "name"]),
    (TEXT[:-40], ["JSON"]),
    (TEXT.replace("[1, 2, 3, 4]", "[1, 2, 3, 4"), ["JSON"]),
    ("", ["JSON"]),
]


def parts(data):
    """The parts of a PNG as (kind, content)."""
    place = 8
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        place += 12 + length


def png(*changed):
    """A PNG made of parts, with check sums that fit."""
    body = (struct.pack(">I", len(x)) + kind + x + zlib.crc32(kind + x).to_bytes(4, "big") for kind, x in changed)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def flipped(kind):
    """A PNG whose part has one other bit."""

    def make(data):
        return data[: data.index(kind) + 8] + bytes([data[data.index(kind) + 8] ^ 1]) + data[data.index(kind) + 9 :]

    return make


IMAGES = [
    ("one bit of the pixels", flipped(b"IDAT"), ["'IDAT'"]),
    ("one bit of a remark", flipped(b"tEXt"), []),
    ("one bit of the size", flipped(b"IHDR"), []),
    ("the end cut off", lambda data: data[:-6], []),
    ("no pixels", lambda data: png(*(p for p in parts(data) if p[0] != b"IDAT")), []),
    ("no header", lambda data: png(*(p for p in parts(data) if p[0] != b"IHDR")), []),
    ("nothing", lambda data: b"", ["PNG", "JPEG"]),
    ("the signature alone", lambda data: data[:8], []),
]
ARRAYS = [
    (None, ["NoneType", "cv2.imread"]),
    ([[[0, 0, 0]]], ["list"]),
    (np.zeros((9, 9, 3), np.float32), ["float32", "(9, 9, 3)"]),
    (np.full((9, 9, 3), np.nan), ["float64"]),
    (np.zeros((9, 9, 3), np.uint16), ["uint16"]),
    (np.zeros((9, 9, 3), bool), ["bool"]),
    (np.zeros((9, 9), np.uint8), ["uint8", "(9, 9)"]),
    (np.zeros((9, 9, 1), np.uint8), ["(9, 9, 1)"]),
    (np.zeros((9, 9, 4), np.uint8), ["(9, 9, 4)"]),
    (np.zeros((3, 9, 9), np.uint8), ["(3, 9, 9)"]),
    (np.zeros((1, 9, 9, 3), np.uint8), ["(1, 9, 9, 3)"]),
    (np.zeros((0, 9, 3), np.uint8), ["(0, 9, 3)"]),
    (np.zeros((9, 0, 3), np.uint8), ["(9, 0, 3)"]),
]


@pytest.mark.parametrize(("content", "named"), ANNOTATIONS)
def test_annotation_files(tmp_path, content, named):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 20)).save(tmp_path / name)
    path = tmp_path / "set.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DatasetError, match=naming(*named)) as caught:
        load_coco_json(path, tmp_path)
    assert "set.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("make", "named"), [row[1:] for row in IMAGES], ids=[row[0] for row in IMAGES])
def test_images(tmp_path, make, named):
    Image.effect_noise((30, 20), 90).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    first, *others = parts(whole)
    whole = png(first, (b"tEXt", b"Comment\0made by hand"), *others)
    (tmp_path / "whole.png").write_bytes(whole)
    assert read_image(str(tmp_path / "whole.png"), "RGB").shape == (20, 30, 3)
    (tmp_path / "x.png").write_bytes(make(whole))
    with pytest.raises(DatasetError, match=naming(*named)) as caught:
        read_image(str(tmp_path / "x.png"), "RGB")
    assert "x.png" in str(caught.value)


@pytest.mark.parametrize(("image", "named"), ARRAYS)
def test_arrays_that_are_no_image(image, named):
    predictor = Predictor.__new__(Predictor)  # refused before any weight is touched
    with pytest.raises(ValueError, match=naming("NumPy", "BGR", *named)):
        predictor(image)


def test_a_header_that_disagrees_with_the_annotation_is_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    """A flipped bit in the size of a WebP or TIFF cost seconds."""
    Image.new("RGB", (30, 20)).save(tmp_path / "x.bmp")
    data = bytearray((tmp_path / "x.bmp").read_bytes())
    data[18:26] = struct.pack("<ii", 8000, 8000)
    (tmp_path / "x.bmp").write_bytes(data)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    mapper = DetrDatasetMapper(False, image_format="RGB", num_classes=0, flips=[], resizes=[], crops=[])
    with pytest.raises(DatasetError, match=naming("x.bmp", "8000x8000", "30x20")):
        mapper({"file_name": str(tmp_path / "x.bmp"), "height": 20, "width": 30})
