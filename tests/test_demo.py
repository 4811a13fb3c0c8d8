import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from naming import naming
from PIL import Image

import demo
from dn_detr_d2 import ConfigError
from dn_detr_d2.coco import coco_names, raw_names
from dn_detr_d2.commands import predict
from dn_detr_d2.commands.predict import no_window, plan_targets, writing
from dn_detr_d2.data import read_image
from dn_detr_d2.predictor import Predictor
from dn_detr_d2.sources import Video
from dn_detr_d2.visualization.demo import VisualizationDemo, class_metadata
from dn_detr_d2.visualization.images import class_names

NAMES = ["a", "b", "c", "d", "e"]


@pytest.fixture
def finished(toy_cfg, toy_model, tmp_path):
    """Config and weights as a training leaves them: (path of config.yaml, path of weights, config)."""
    cfg = toy_cfg("dn_deformable_detr", "MODEL.DN_DETR.CLASS_NAMES", NAMES, "INPUT.MIN_SIZE_TEST", 64)
    torch.save({"model": toy_model("dn_deformable_detr").state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return tmp_path / "config.yaml", tmp_path / "model.pth", cfg


@pytest.fixture
def run(monkeypatch, capsys, finished, tmp_path):
    """run(*arguments) -> (exit code, stdout, stderr); output goes to tmp_path/out."""

    def call(*arguments):
        command = [
            "demo.py",
            "--config-file",
            str(finished[0]),
            *([] if "--output" in arguments else ["--output", str(tmp_path / "out")]),
            *map(str, arguments),
        ]
        monkeypatch.setattr(sys, "argv", command)
        code = demo.main()
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def images(tmp_path):
    """A folder with a wide, a tall and a tiny image, and a text file."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.RandomState(0)
    for name, size in (("wide.jpg", (60, 150)), ("tall.png", (140, 50)), ("tiny.bmp", (9, 7))):
        Image.fromarray(rng.randint(0, 256, (*size, 3), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_pictures_and_json_of_a_folder(run, images, tmp_path):
    code, said, _ = run("--input", images, "--confidence-threshold", "0.0", "--json")
    assert code == 0
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"wide.jpg", "tall.png", "tiny.png", "results.json"}
    assert all(cv2.imread(str(out / name)) is not None for name in ("wide.jpg", "tall.png", "tiny.png"))
    records = json.loads((out / "results.json").read_text())
    assert f"{len(records)} boxes" in said
    for record in records:
        width, height = Image.open(record["file_name"]).size
        x0, y0, x1, y1 = record["box_xyxy"]
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        assert record["class_name"] == NAMES[record["class"]]


def test_the_threshold_is_kept(run, images, tmp_path):
    run("--input", images / "wide.jpg", "--confidence-threshold", "0.0", "--json")
    every = json.loads((tmp_path / "out" / "results.json").read_text())
    middle = sorted(r["score"] for r in every)[len(every) // 2] + 1e-4
    run("--input", images / "wide.jpg", "--confidence-threshold", middle, "--json")
    left = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 < len(left) < len(every)
    assert all(r["score"] >= round(middle, 4) - 1e-4 for r in left)


def test_an_unreadable_image_is_named_and_the_rest_is_drawn(run, images, tmp_path):
    (images / "broken.png").write_bytes(b"not a picture")
    code, _, said = run("--input", images)
    assert code == 1
    assert "broken.png" in said
    assert (tmp_path / "out" / "wide.jpg").exists()
    assert not (tmp_path / "out" / "broken.png").exists()


def test_what_is_no_file_is_named_and_the_rest_is_drawn(run, images, tmp_path):
    os.mkfifo(images / "pipe.png")  # opening it would wait for ever
    (images / "folder.jpg").mkdir()
    code, _, said = run("--input", images)
    assert code == 1
    assert naming("pipe.png", "folder.jpg").search(said)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"wide.jpg", "tall.png", "tiny.png"}


def test_weights_that_lack_the_transformer_are_refused(run, images, finished, tmp_path):
    weights = torch.load(finished[1], weights_only=True)["model"]
    torch.save({"model": {k: v for k, v in weights.items() if k.startswith("backbone.")}}, tmp_path / "part.pth")
    code, _, said = run("--input", images, "--opts", "MODEL.WEIGHTS", tmp_path / "part.pth")
    assert code == 2
    assert naming("part.pth", "missing").search(said)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--input", "nowhere.jpg"], ["--input", "nowhere.jpg"]),
        (["--input", "EMPTY"], ["--input", "EMPTY"]),
        (["--input", "IMAGES", "--opts", "MODEL.WEIGHTS", "gone.pth"], ["MODEL.WEIGHTS", "'gone.pth'"]),
        (["--input", "IMAGES", "COPY"], ["tall.png"]),
        (["--input", "IMAGES", "--output", "IMAGES"], ["--output", "IMAGES", "tall.png"]),
        (["--input", "IMAGES", "--output", "FILE"], ["--output", "FILE"]),
    ],
)
def test_mistakes_are_one_sentence_and_leave_no_folder(run, images, tmp_path, arguments, named):
    (tmp_path / "empty").mkdir()
    shutil.copytree(images, tmp_path / "copy")
    names = {"IMAGES": images, "EMPTY": tmp_path / "empty", "FILE": images / "notes.txt", "COPY": tmp_path / "copy"}
    names = {name: str(path) for name, path in names.items()}
    code, _, said = run(*(names.get(a, a) for a in arguments))
    assert code == 2
    assert naming(*(names.get(x, x) for x in named)).search(said)
    assert not (tmp_path / "out").exists()


def test_the_predictor_takes_bgr_and_gives_the_model_rgb(finished, images):
    """Same numbers as the model on the RGB image; other numbers when the channels are swapped."""
    cfg = finished[2]
    bgr = read_image(str(images / "tall.png"), "BGR")
    predicted = DefaultPredictor(cfg)(bgr)["instances"]
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"])
    rgb = np.asarray(Image.open(images / "tall.png"))
    resized = np.asarray(Image.fromarray(rgb).resize((64, round(140 * 64 / 50)), Image.Resampling.BILINEAR))
    with torch.no_grad():
        pixels = torch.from_numpy(resized.transpose(2, 0, 1).copy())
        direct = model([{"image": pixels, "height": 140, "width": 50}])[0]["instances"]
    torch.testing.assert_close(predicted.scores, direct.scores, atol=1e-5, rtol=0)
    swapped = DefaultPredictor(cfg)(np.ascontiguousarray(bgr[:, :, ::-1]))["instances"]
    assert (swapped.scores[:5] - predicted.scores[:5]).abs().max() > 1e-5
    assert predicted.image_size == (140, 50)


def test_thin_images_are_drawn(run, images, tmp_path):
    for size in ((3000, 2), (2, 3000), (1, 1), (900, 1)):
        Image.new("RGB", size).save(images / f"thin_{size[0]}x{size[1]}.png")
    code, _, said = run("--input", images, "--confidence-threshold", "0", "--json")
    assert (code, said) == (0, "")
    assert len(list((tmp_path / "out").glob("thin_*.png"))) == 4
    for record in json.loads((tmp_path / "out" / "results.json").read_text()):
        width, height = Image.open(record["file_name"]).size
        x0, y0, x1, y1 = record["box_xyxy"]
        assert 0 <= x0 <= x1 <= width
        assert 0 <= y0 <= y1 <= height


def test_an_error_at_one_image_is_named_and_counted_and_the_others_are_drawn(run, images, tmp_path, monkeypatch):
    draw = VisualizationDemo._draw

    def fail_once(self, image, found):
        if image.shape == (9, 7, 3):
            raise RuntimeError("no room\nleft")
        return draw(self, image, found)

    monkeypatch.setattr(VisualizationDemo, "_draw", fail_once)
    code, _, errors = run("--input", images, "--json")
    assert code == 1
    assert naming("tiny.bmp", "RuntimeError", "no room left").search(errors)
    assert "1 of 3 images" in errors
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"wide.jpg", "tall.png", "results.json"}


@pytest.mark.parametrize("threshold", ["50", "nan", "-1", "inf", "1.01"])
def test_a_threshold_that_is_no_probability_is_refused(run, images, tmp_path, threshold):
    code, _, said = run("--input", images, "--confidence-threshold", threshold)
    assert code == 2
    assert "--confidence-threshold" in said
    assert threshold in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("threshold", ["0", "1"])
def test_the_ends_of_the_range_are_thresholds(run, images, threshold):
    assert run("--input", images / "tall.png", "--confidence-threshold", threshold)[0] == 0


def results(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.fixture
def promptable(finished, toy_cfg, toy_model, tmp_path):
    """A model whose queries have the unknown label, in the place of the finished training."""
    cfg = toy_cfg("dn_detr", "MODEL.DN_DETR.CLASS_NAMES", NAMES, "INPUT.MIN_SIZE_TEST", 64)
    torch.save({"model": toy_model("dn_detr").state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return cfg


def test_what_was_found_can_be_given_as_known(run, images, promptable, tmp_path):
    """results.json of one run is --known of the next; the predictor says the same of it."""
    run("--input", images, "--confidence-threshold", "0", "--json")
    first = results(tmp_path)
    few = [next(x for x in first if x["file_name"].endswith(name)) for name in ("wide.jpg", "wide.jpg", "tall.png")]
    few[1] = few[1] | {"class": "b"}  # by its name
    (tmp_path / "boxes.json").write_text(json.dumps(few))
    code, _, errors = run(
        "--input", images, "--confidence-threshold", "0", "--json", "--known", tmp_path / "boxes.json"
    )
    assert (code, errors) == (0, "")
    boxes = Boxes(torch.tensor([x["box_xyxy"] for x in few[:2]]))
    known = Instances((60, 150), gt_boxes=boxes, gt_classes=torch.tensor([few[0]["class"], 1]))
    predictor = Predictor(promptable)
    expected = predictor(read_image(str(images / "wide.jpg"), "BGR"), known=known)["instances"]
    found = {
        name: [x["score"] for x in results(tmp_path) if x["file_name"].endswith(name)]
        for name in ("wide.jpg", "tiny.bmp")
    }
    assert found["wide.jpg"] == pytest.approx(expected.scores.tolist(), abs=1e-4)
    assert found["tiny.bmp"] == [x["score"] for x in first if x["file_name"].endswith("tiny.bmp")]


@pytest.mark.parametrize(("labels", "classes"), [("b, d", {1, 3}), ("1,d", {1, 3}), ("e", {4}), ("", set())])
def test_labels_are_looked_for_by_name_or_number(run, images, promptable, tmp_path, labels, classes):
    code, _, _ = run("--input", images, "--confidence-threshold", "0", "--json", "--labels", labels)
    assert code == 0
    assert {x["class"] for x in results(tmp_path)} == classes


ENTRY = {"file_name": "IMAGE", "class": 0, "box_xyxy": [1, 2, 30, 40]}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("not json", ("--known",)),
        (None, ("--known", "boxes.json")),
        ([ENTRY | {"file_name": "other.png"}], ("--known", 0, "other.png")),
        ([ENTRY, ENTRY | {"box_xyxy": [1, 2, 3]}], ("--known", 1, "[1, 2, 3]")),
        ([ENTRY | {"box_xyxy": [1, 2, 3, "4"]}], ("--known", 0)),
        ([{"class": 0, "box_xyxy": [1, 2, 30, 40]}], ("--known", 0)),
        ([[1, 2, 30, 40]], ("--known", 0, "[1, 2, 30, 40]")),
        (3, ("--known", 0)),
        ([ENTRY | {"class": "z"}], ("'z'",)),
        ([ENTRY | {"class": 5}], (5,)),
        ([ENTRY | {"box_xyxy": [1, 2, 151, 40]}], (151.0, "wide.jpg")),
    ],
)
def test_known_objects_that_are_none_are_one_sentence(run, images, promptable, tmp_path, content, named):
    text = content if isinstance(content, str) else json.dumps(content).replace("IMAGE", str(images / "wide.jpg"))
    if content is not None:
        (tmp_path / "boxes.json").write_text(text)
    code, _, said = run("--input", images / "wide.jpg", "--known", tmp_path / "boxes.json")
    assert code == (1 if 151.0 in named else 2)
    assert naming(*named).search(said)
    assert "Traceback" not in said


@pytest.mark.parametrize(("labels", "named"), [("z", ("'z'",)), ("a,9", (9,)), ("a,a", ("[0, 0]",))])
def test_labels_that_do_not_exist_are_one_sentence(run, images, promptable, labels, named):
    code, _, said = run("--input", images / "wide.jpg", "--labels", labels)
    assert code == 2
    assert naming(*named).search(said)


def test_a_model_with_learnt_contents_refuses_labels_once(run, images):
    code, out, said = run("--input", images, "--labels", "a")
    assert (code, out) == (2, "")  # found before the first image
    assert naming("QUERY_SOURCE.CONTENT").search(said)
    assert not any(name in said for name in ("wide.jpg", "tall.png"))


def test_a_model_with_masks_refuses_labels_once(run, toy_cfg, toy_model, finished, images):
    cfg = toy_cfg("mask_dino")
    torch.save({"model": toy_model("mask_dino").state_dict()}, finished[1])
    cfg.MODEL.WEIGHTS = str(finished[1])
    finished[0].write_text(cfg.dump())
    code, out, said = run("--input", images, "--labels", "0")
    assert (code, out) == (2, "")
    assert naming("MASK.ENABLED").search(said)
    assert not any(name in said for name in ("wide.jpg", "tall.png"))


@pytest.mark.parametrize(("outputs", "word"), [
    (["instances"], "objects"), (["panoptic_seg", "instances"], "segments"), (["panoptic_seg"], "segments"),
    (["sem_seg"], "classes"),
])  # fmt: skip
def test_pictures_of_a_model_with_masks(run, toy_cfg, toy_model, finished, images, tmp_path, outputs, word):
    size, things = (
        ["MODEL.DN_DETR.CLASS_NAMES", NAMES, "INPUT.MIN_SIZE_TEST", 64],
        ["MODEL.DN_DETR.MASK.THING_CLASSES", [0, 1]],
    )
    options = [*size, *things, "MODEL.DN_DETR.MASK.OUTPUTS", outputs, "MODEL.DN_DETR.MASK.OBJECT_THRESHOLD", 0.0]
    cfg = toy_cfg("mask_dino", *options, "MODEL.DN_DETR.MASK.OVERLAP_THRESHOLD", 0.0)
    torch.save({"model": toy_model("mask_dino", *options).state_dict()}, finished[1])
    cfg.MODEL.WEIGHTS = str(finished[1])
    finished[0].write_text(cfg.dump())
    code, out, err = run("--input", images / "wide.jpg", "--confidence-threshold", 0)
    assert (code, err) == (0, "")
    assert word in out
    drawn, given = (cv2.imread(str(path)) for path in (tmp_path / "out" / "wide.jpg", images / "wide.jpg"))
    assert cv2.resize(given, drawn.shape[1::-1]).shape == drawn.shape
    assert np.abs(cv2.resize(given, drawn.shape[1::-1]).astype(int) - drawn).mean() > 10
    code, _, err = run("--input", images, "--json")
    assert code == (0 if "instances" in outputs else 2)
    assert "instances" in outputs or naming("MASK.OUTPUTS").search(err)


@pytest.mark.parametrize(("threshold", "segments"), [(None, 1), (0.2, 1), (0.95, 0)])
def test_the_threshold_is_that_of_segments_too(finished, toy_cfg, threshold, segments):
    """One segment of score 0.9 against MASK.OBJECT_THRESHOLD 0.8 of the config."""
    cfg = toy_cfg(
        "mask_dino", "MODEL.DN_DETR.MASK.OUTPUTS", ["panoptic_seg"], "MODEL.DN_DETR.MASK.OBJECT_THRESHOLD", 0.8
    )
    cfg.MODEL.WEIGHTS = str(finished[1])
    finished[0].write_text(cfg.dump())
    more = [] if threshold is None else ["--confidence-threshold", str(threshold)]
    args = predict.parse_arguments(["--config-file", str(finished[0]), "--input", "a.png", "--output", "out", *more])
    read = predict.read_config(args)
    assert (read.MODEL.DN_DETR.MASK.OBJECT_THRESHOLD < 0.9) == bool(segments)


def test_results_do_not_overwrite_known_objects(run, images, promptable, tmp_path):
    (tmp_path / "out").mkdir()
    known = tmp_path / "out" / "results.json"
    known.write_text(json.dumps([ENTRY | {"file_name": str(images / "wide.jpg")}]))
    before = known.read_bytes()
    code, _, said = run("--input", images, "--known", known, "--json")
    assert code == 2
    assert naming("--json", "--known", known).search(said)
    assert known.read_bytes() == before


@pytest.mark.parametrize("source", ["--input", "--video-input"])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_computed(run, images, video, tmp_path, source):
    (tmp_path / "file").write_text("x")
    given = images if source == "--input" else video
    code, _, said = run(source, given, "--output", tmp_path / "file" / "out")
    assert code == 2
    assert naming("--output", tmp_path / "file").search(said.splitlines()[-1])
    assert "Traceback" not in said


@pytest.mark.parametrize("size", [(1, 64), (64, 1), (63, 65), (64, 96)])
def test_a_video_keeps_every_row_and_column(tmp_path, size):
    """Odd sides get another one of the same pixels: the format has even ones alone."""
    target, (height, width) = tmp_path / "out.mp4", size
    with writing(target, 10.0) as write:
        write(np.full((height, width, 3), 90, np.uint8))
    with Video(target) as video:
        (frame,) = list(video)
    assert frame.shape == (height + height % 2, width + width % 2, 3)
    assert abs(frame.astype(int) - 90).max() < 12


def test_a_pattern_and_one_picture_as_output(run, images, tmp_path):
    code, _, err = run("--input", images / "*.[pb]*", "--output", tmp_path / "drawn", "--json")
    assert (code, err) == (0, "")
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"tall.png", "tiny.png", "results.json"}
    assert run("--input", images / "wide.jpg", "--output", tmp_path / "new" / "one.png")[0] == 0
    assert cv2.imread(str(tmp_path / "new" / "one.png")).shape == (480, 1200, 3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--input", "IMAGES/*.xyz"], ["--input", "*.xyz"]),
        (["--input", "https://a.org/b.jpg"], ["--input", "https://a.org/b.jpg", "URL"]),
        (["--input", "IMAGES", "--output", "OUT/x.png"], ["x.png", 3]),
        (["--input", "IMAGES/wide.jpg", "--output", "OUT/x.tif"], ["x.tif", ".png"]),
        (["--input", "IMAGES", "--track"], ["--track", "--video-input"]),
        (["--input", "IMAGES", "--tile", "-3"], ["TEST.TILE.SIZE", "-3"]),
        (["--video-input", "gone.mp4"], ["gone.mp4"]),
        (["--video-input", "IMAGES"], ["images"]),
        (["--video-input", "IMAGES/notes.txt"], ["notes.txt"]),
        (["--video-input", "http://a.org/b.mp4"], ["http://a.org/b.mp4", "URL"]),
        (["--video-input", "VIDEO", "--output", "OUT/x.avi"], ["x.avi", "mp4"]),
        (["--video-input", "VIDEO", "--output", "VIDEO"], ["pan.mp4"]),
        (["--video-input", "VIDEO", "--known", "x.json"], ["--known", "--input"]),
    ],
)
def test_mistakes_of_sources_and_outputs(run, images, video, tmp_path, arguments, named):
    names = {"IMAGES": str(images), "VIDEO": str(video), "OUT": str(tmp_path / "out")}
    for short, long in names.items():
        arguments = [x.replace(short, long) for x in arguments]
    code, _, said = run(*arguments)
    assert code == 2
    assert said.count("\n") == 1
    assert naming(*named).search(said)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def video(tmp_path):
    """Twelve frames of 96 x 64 pixels at 8 a second: a bright square that moves to the right by 3 pixels a frame."""
    path = tmp_path / "pan.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 8.0, (96, 64))
    for i in range(12):
        frame = np.full((64, 96, 3), 40, np.uint8)
        frame[20:44, 5 + 3 * i : 29 + 3 * i] = 230
        writer.write(frame)
    writer.release()
    return path


class FindsBright:
    """In the place of the predictor: the box around the bright pixels, class 1."""

    def __init__(self, cfg):
        pass

    def __call__(self, image):
        y, x = np.nonzero(image.min(2) > 150)
        box = torch.tensor([[x.min(), y.min(), x.max() + 1.0, y.max() + 1.0]])
        fields = {"pred_boxes": Boxes(box), "scores": torch.tensor([0.9]), "pred_classes": torch.tensor([1])}
        return {"instances": Instances(image.shape[:2], **fields)}


def test_a_video_is_drawn_frame_by_frame_and_its_objects_keep_number_and_colour(run, video, tmp_path, monkeypatch):
    pytest.importorskip("trackers")
    monkeypatch.setattr("dn_detr_d2.visualization.demo.Predictor", FindsBright)
    code, out, err = run("--video-input", video, "--json", "--track")
    assert (code, err) == (0, "")
    assert "12 frames" in out
    found = results(tmp_path)
    assert [x["frame"] for x in found] == list(range(12))
    assert [x["box_xyxy"][0] for x in found] == pytest.approx(
        [5 + 3 * i for i in range(12)], abs=1.5
    )  # it is compressed
    assert found[0]["track_id"] is None  # an object is confirmed in its second frame
    assert len({x["track_id"] for x in found[1:]}) == 1
    assert {x["class_name"] for x in found} == {"b"}
    with Video(tmp_path / "out" / "pan.mp4") as written:
        frames = list(written)
    assert (written.frame_rate, len(frames), frames[0].shape) == (8.0, 12, (480, 720, 3))
    edges = [frame[32 * 480 // 64, (5 + 3 * i) * 720 // 96 + 1].astype(int) for i, frame in enumerate(frames)]
    assert np.abs(np.diff(edges[1:], axis=0)).max() < 90  # the left edge of the box, in one colour
    assert np.abs(edges[1] - edges[0]).max() > 20  # which was grey before


def test_frames_of_a_capture_are_those_of_images(finished, video):
    """VisualizationDemo as Detectron2's: the records of a frame are those of the same image."""
    demo_of_model = VisualizationDemo(finished[2], 0.0)
    frames = list(demo_of_model.run_on_video(cv2.VideoCapture(str(video))))
    assert len(frames) == 12
    assert all(frame.shape == (480, 720, 3) and frame.dtype == np.uint8 for frame in frames)
    first = next(iter(Video(video)))
    found, drawn = demo_of_model.run_on_image(first)
    ((again, _), *_) = demo_of_model.follow([first])
    assert torch.equal(found["instances"].scores, again["instances"].scores)
    assert drawn.get_image().shape == (480, 720, 3)


@pytest.mark.parametrize("source", ["VIDEO", pytest.param("--webcam", marks=pytest.mark.long)])
def test_a_damaged_video_and_a_missing_camera_are_one_line_of_the_process(finished, video, tmp_path, source):
    """OpenCV and FFmpeg print on their own, past sys.stderr."""
    video.write_bytes(video.read_bytes()[:600])
    given = ["--webcam"] if source == "--webcam" else ["--video-input", str(video)]
    if source == "--webcam" and os.path.exists("/dev/video0"):
        pytest.skip("there is a camera")
    command = [sys.executable, str(ROOT / "demo.py"), "--config-file", str(finished[0]), *given]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert naming("pan.mp4" if source == "VIDEO" else "camera").search(done.stderr)
    assert not (tmp_path / "out").exists()


def test_tracks_need_their_package(run, video, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    code, _, err = run("--video-input", video, "--track")
    assert code == 2
    assert naming("--track", "[track]").search(err)


def test_a_video_that_ends_early_is_drawn_and_named(run, video, tmp_path, monkeypatch):
    monkeypatch.setattr("dn_detr_d2.visualization.demo.Predictor", FindsBright)
    opened = Video(video)
    monkeypatch.setattr("dn_detr_d2.commands.predict.Video", lambda source: opened)
    opened.expected = 30  # what the header of the cut file would say
    code, _, err = run("--video-input", video)
    assert code == 1
    assert naming("pan.mp4", 30, 12).search(err)
    assert (tmp_path / "out" / "pan.mp4").exists()


def test_frames_of_another_size_are_resized_and_none_is_lost(tmp_path):
    target = tmp_path / "out.mp4"
    shapes = [(48, 64, 3), (96, 128, 3), (48, 64, 3), (30, 64, 3)]
    with writing(target, 10.0) as write:
        for level, shape in enumerate(shapes):
            write(np.full(shape, 60 * level, np.uint8))
    with Video(target) as video:
        frames = list(video)
    assert [frame.shape for frame in frames] == [shapes[0]] * 4
    assert [round(frame.mean() / 60) for frame in frames] == [0, 1, 2, 3]


GTK = "  GUI:                           GTK3\n"


@pytest.mark.parametrize(
    ("build", "display", "way"),
    [("  GUI:                           NONE\n", ":0", False), ("", ":0", False), (GTK, "", False), (GTK, ":0", True)],
)
def test_a_window_needs_opencv_with_one_and_a_screen(monkeypatch, build, display, way):
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.setenv("WAYLAND_DISPLAY", "")
    assert (no_window(build) == "") is way


def test_without_output_pictures_are_shown_until_escape(finished, images, monkeypatch, capsys):
    arguments = ["--config-file", str(finished[0]), "--input", str(images)]
    if no_window(cv2.getBuildInformation()):
        assert demo.main(arguments) == 2
        assert naming("--output", "window").search(capsys.readouterr().err)
    shown = []
    monkeypatch.setattr("dn_detr_d2.commands.predict.no_window", lambda build: "")
    monkeypatch.setattr(cv2, "imshow", lambda name, picture: shown.append(picture.shape))
    monkeypatch.setattr(cv2, "waitKey", lambda wait: 27 if len(shown) == 2 else -1)
    assert demo.main(arguments) == 0
    assert shown == [(1344, 480, 3), (617, 480, 3)]  # tall.png, tiny.bmp; Esc before wide.jpg


def test_tiles_are_an_override_of_the_config(run, images, tmp_path):
    options = ("--input", images / "wide.jpg", "--confidence-threshold", "0", "--json")
    run(*options, "--tile", "64")
    tiled = results(tmp_path)
    run(*options, "TEST.TILE.SIZE", "64")
    assert results(tmp_path) == tiled
    run(*options)
    assert results(tmp_path) != tiled


def test_an_image_named_twice_is_drawn_once(run, images, tmp_path):
    code, said, _ = run("--input", images, images / "wide.jpg", f"{images}/../images/wide.jpg")
    assert code == 0
    assert said.count("wide.jpg ->") == 0
    assert said.count("-> " + str(tmp_path / "out" / "wide.jpg")) == 1


def test_many_pictures_are_planned_in_linear_time():
    images = [Path(f"a/{i}.png") for i in range(20000)]
    start = time.process_time()
    assert len(plan_targets(images, Path("gone"))) == 20000
    assert time.process_time() - start < 10  # it was a minute
    with pytest.raises(ConfigError, match=naming("a/0.png", "b/0.png", "gone/0.png")):
        plan_targets([*images, Path("b/0.png")], Path("gone"))


@pytest.mark.parametrize("named", [True, False])
def test_classes_of_auto_are_those_of_the_weights(run, images, finished, tmp_path, named):
    path, weights, cfg = finished
    cfg.MODEL.DN_DETR.NUM_CLASSES, cfg.MODEL.DN_DETR.CLASS_NAMES = None, []
    path.write_text(cfg.dump())
    content = torch.load(weights, weights_only=True)
    torch.save(content | ({"class_names": NAMES} if named else {}), weights)
    code, _, said = run("--input", images / "wide.jpg", "--json", "--confidence-threshold", "0")
    assert (code, said) == (0, "")
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    assert records
    assert all(x["class_name"] == (NAMES[x["class"]] if named else str(x["class"])) for x in records)


def test_labels_of_auto_are_classes_of_the_weights(run, images, promptable):
    code, _, said = run("--input", images, "--labels", "nothing", "--opts", "MODEL.DN_DETR.NUM_CLASSES", "auto")
    assert code == 2
    assert naming("'nothing'").search(said)
    assert "TypeError" not in said


@pytest.mark.parametrize(("number", "listed", "expected"), [
    (80, "coco_2017_val", coco_names()), (91, "coco_2017_val", raw_names()), (5, "coco_2017_val", ()), (5, "", ()),
])  # fmt: skip
def test_names_are_those_of_as_many_classes(toy_cfg, number, listed, expected):
    cfg = toy_cfg("dn_detr", "MODEL.DN_DETR.NUM_CLASSES", number)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN = (listed,) if listed else ()
    assert tuple(class_metadata(cfg).get("thing_classes", [])) == expected
    assert class_names(cfg) == (list(expected) or [f"class {i}" for i in range(number)])


def test_a_class_name_with_dollar_signs_is_drawn(run, images, finished, tmp_path):
    path, _, cfg = finished
    cfg.MODEL.DN_DETR.CLASS_NAMES = [f"a$5_${x}" for x in NAMES]
    path.write_text(cfg.dump())
    code, _, said = run("--input", images, "--confidence-threshold", "0")
    assert (code, said) == (0, "")


@pytest.mark.parametrize("threshold", [50, float("nan"), -1])
def test_a_threshold_in_python_is_a_probability_too(finished, threshold):
    with pytest.raises(ConfigError, match=naming("confidence_threshold", threshold)):
        VisualizationDemo(finished[2], threshold)
