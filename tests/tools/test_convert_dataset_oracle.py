"""Converted sets against boxes computed in fractions, read back by the reader of the training.

Sets are drawn by hypothesis: pictures in folders, boxes and polygons inside, across and outside their edges, degenerate
ones, and the notations that exporters use.
"""

import json
import tempfile
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from dn_detr_d2.commands import convert_dataset as tool
from dn_detr_d2.data import load_coco_json
from dn_detr_d2.data.check import annotated_sizes, check_content
from dn_detr_d2.data.report import Report

CLASSES = ["cat", "traffic light", "dog"]
STEP = 64  # coordinates are multiples of 1 / STEP, exact in float32 and in decimal
NOTATIONS = ("{}", "{:.10e}", "{:+.8f}", "{:.12g}")
PARTS = st.integers(-STEP, 3 * STEP // 2).map(lambda n: Fraction(n, STEP))
EXTENTS = st.integers(-4, 3 * STEP // 2).map(lambda n: Fraction(n, STEP))
FILES = st.sampled_from(["a.png", "b c.PNG", "sub/a.bmp", "sub/deep/é.jpg"])
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))  # (width, height)


def visible(left, top, right, bottom, size):
    """[x, y, width, height] of what a picture of ``size`` (width, height) shows of a rectangle, None for nothing."""
    if right <= left or bottom <= top:
        return None
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
    return [left, top, right - left, bottom - top] if left < right and top < bottom else None


def convert(folder, kind, *options):
    """The records of a converted set, and its content; the content must be without a problem."""
    out = folder / "out.json"
    folders = [str(folder / name) for name in ("labels", "images")]
    assert tool.main([kind, *folders, str(out), "--allow-empty", "--names", str(folder / "classes.txt"), *options]) == 0
    content, report = json.loads(out.read_text()), Report()
    check_content(content, report, annotated_sizes(content["images"]))
    if content["annotations"]:
        assert report.problems() == {}, report.lines()
    return load_coco_json(out, folder / "images")


def compare(records, folder, expected):
    """That the records of a reader have the ``expected`` {file name: [(class, box)]}."""
    found = {
        Path(record["file_name"]).relative_to(folder / "images").as_posix(): [
            (CLASSES[x["category_id"]], x["bbox"]) for x in record["annotations"]
        ]
        for record in records
    }
    assert sorted(found) == sorted(expected)
    for name, objects in expected.items():
        assert [label for label, _ in found[name]] == [label for label, _ in objects]
        for (_, box), (_, other) in zip(found[name], objects, strict=True):
            assert box == pytest.approx([float(x) for x in other], abs=1e-5)


def draw_folders(folder, sizes):
    """Pictures of {name: (width, height)}, and the class file."""
    (folder / "labels").mkdir()
    (folder / "images").mkdir()
    for name, size in sizes.items():
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size).save(folder / "images" / name)
    (folder / "classes.txt").write_text("\n".join(CLASSES), "utf-8")


def label_file(folder, name, ending):
    """The path of the label file of a picture, whose folder exists."""
    path = (folder / "labels" / name).with_suffix(ending)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


BOXES = st.tuples(st.integers(0, 2), st.tuples(PARTS, PARTS, EXTENTS, EXTENTS))
POLYGONS = st.tuples(
    st.integers(0, 2), st.lists(st.tuples(PARTS, PARTS), min_size=3, max_size=6).map(lambda p: sum(p, ()))
)
LINES = st.lists(st.one_of(BOXES, POLYGONS), max_size=5)


@settings(max_examples=60, deadline=None)
@given(
    pictures=st.dictionaries(FILES, st.tuples(SIZES, st.none() | LINES), min_size=1),
    notation=st.sampled_from(NOTATIONS),
    label=st.sampled_from(["{}", "{:.1f}", "{:+d}", "{:.18e}"]),
    blank=st.sampled_from([" ", "\t", "  "]),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_yolo_boxes_are_those_of_a_slow_computation(pictures, notation, label, blank, end, encoding):
    expected = {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        draw_folders(folder, {name: size for name, (size, _) in pictures.items()})
        for name, (size, lines) in pictures.items():
            expected[name] = []
            for number, values in dict.fromkeys(lines or ()):  # without repetitions
                if len(values) == 4:
                    cx, cy, w, h = values
                    edges = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
                else:
                    edges = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
                box = visible(*(edge * size[i % 2] for i, edge in enumerate(edges)), size)
                expected[name] += [(CLASSES[number], box)] if box else []
            if lines is not None:
                rows = [
                    blank.join([label.format(number), *(notation.format(float(v)) for v in values)])
                    for number, values in lines
                ]
                label_file(folder, name, ".txt").write_bytes(end.join([*rows, ""]).encode(encoding))
        compare(convert(folder, "yolo", "--boxes", "cxcywh"), folder, expected)


CORNERS = st.tuples(*[st.integers(-6, 44)] * 4)
OBJECTS = st.lists(st.tuples(st.integers(0, 2), CORNERS), max_size=5)


def xml(name, size, objects, filename, says_size, halves):
    """An annotation; corners get ``halves`` added."""
    texts = {
        "right": name,
        "last part": Path(name).name,
        "none": "",
        "bare": Path(name).stem,
        "gone": "C:\\x\\gone.jpg",
    }
    width, height = size if says_size else (0, 0)
    things = "".join(
        f"<object><name>{CLASSES[number]}</name><bndbox>"
        + "".join(f"<{k}>{v + halves}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
        + "</bndbox></object>\n"
        for number, corners in objects
    )
    said = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>\n<filename>{texts[filename]}</filename>{said}\n{things}</annotation>"


@settings(max_examples=60, deadline=None)
@given(
    pictures=st.dictionaries(FILES, st.tuples(SIZES, OBJECTS), min_size=1),
    filename=st.sampled_from(["right", "last part", "none", "bare", "gone"]),
    says_size=st.booleans(),
    halves=st.sampled_from([0, 0.0, 0.5]),
    zero_based=st.booleans(),
)
def test_voc_boxes_are_those_of_a_slow_computation(pictures, filename, says_size, halves, zero_based):
    first, expected = int(not zero_based), {}
    values = [v + halves for _, objects in pictures.values() for _, corners in objects for v in corners]
    assume(not values or min(values) < 0 or max(values) > 1)  # parts of width and height, which are refused
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        draw_folders(folder, {name: size for name, (size, _) in pictures.items()})
        for name, (size, objects) in pictures.items():
            label_file(folder, name, ".xml").write_text(xml(name, size, objects, filename, says_size, halves), "utf-8")
            expected[name] = []
            for number, (x0, y0, x1, y1) in objects:
                # Corners count pixels: the second is part of the box if they begin at 1. Further apart, they are exchanged.
                x0, x1 = (x1, x0) if x1 < x0 - first else (x0, x1)
                y0, y1 = (y1, y0) if y1 < y0 - first else (y0, y1)
                shift = Fraction(halves) - first
                box = visible(x0 + shift, y0 + shift, x1 + shift + first, y1 + shift + first, size)
                expected[name] += [(CLASSES[number], box)] if box else []
        compare(convert(folder, "voc", *(["--zero-based"] if zero_based else [])), folder, expected)


@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_boxes_come_back_from_a_format_that_rounds(tmp_path, kind):
    """Boxes written with six decimals as most exporters do, or as whole corners, are the same within that rounding."""
    size, boxes = (40, 30), [[3, 4, 10, 12], [0, 0, 40, 30], [39, 29, 1, 1], [17, 5, 23, 7]]
    draw_folders(tmp_path, {"a.png": size})
    if kind == "yolo":
        rows = [(x + w / 2, y + h / 2, w, h) for x, y, w, h in boxes]
        text = "\n".join(f"0 {a / 40:.6f} {b / 30:.6f} {c / 40:.6f} {d / 30:.6f}" for a, b, c, d in rows)
        label_file(tmp_path, "a.png", ".txt").write_text(text)
    else:
        corners = [(0, (x + 1, y + 1, x + w, y + h)) for x, y, w, h in boxes]
        label_file(tmp_path, "a.png", ".xml").write_text(xml("a.png", size, corners, "right", True, 0))
    [record] = convert(tmp_path, kind)
    found = [x["bbox"] for x in record["annotations"]]
    assert found == [pytest.approx(box, abs=0 if kind == "voc" else 1e-4) for box in boxes]
