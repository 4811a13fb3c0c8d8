"""The report of a training: what stands in it, what is left out and why, and that a browser shows it."""

import base64
import json
import re
import shutil
import subprocess
from io import BytesIO

import numpy as np
import pytest
import supervision as sv
from conftest import ROOT, SYSTEMS
from naming import naming
from PIL import Image
from toy_training import make_cfg, train

from dn_detr_d2 import UserError, setup_cfg
from dn_detr_d2.commands.train import main
from dn_detr_d2.engine import extras
from dn_detr_d2.errors import DatasetError
from dn_detr_d2.evaluation.precision_recall import PrecisionRecall, read_precision_recall
from dn_detr_d2.report import announce, at_end, report_after_training
from dn_detr_d2.report.build import SECTIONS, write_report
from dn_detr_d2.report.detections import quality, read_evaluated
from dn_detr_d2.report.figures import class_bars
from dn_detr_d2.report.page import Section, drawing, page, table
from tools import make_report

LIMIT = 5e6  # bytes
TITLES = [*SECTIONS]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """OUTPUT_DIR of a training of seconds with two evaluations, diagnostics and averaged weights."""
    made = tmp_path_factory.mktemp("trained") / "out"
    options = ["DATASETS.TEST", ("shapes_val",), "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", ()]
    options += ["TEST.INSTABILITY.NUM_IMAGES", 2, "TEST.INSTABILITY.HEALTH_SCALES", [0.4], "MODEL_EMA.ENABLED", True]
    cfg = make_cfg(made, *options)
    train(cfg)
    (made / "config.yaml").write_text(cfg.dump())
    (made / "log.txt").write_text("[d2]: Command line arguments: Namespace(resume=False, opts=['SEED', '7'])\n")
    return made


@pytest.fixture(scope="module")
def report(folder):
    """The page of that training."""
    return write_report(config(folder))


@pytest.fixture
def quick(monkeypatch):
    """Without the self-tests of the doctor, which take seconds."""
    monkeypatch.setattr("dn_detr_d2.doctor.examine", lambda cfg: [])


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of it that a test may change, and its config."""
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("report"))
    return tmp_path / "copy", config(tmp_path / "copy")


def config(folder, *opts):
    return setup_cfg(str(folder / "config.yaml"), [*opts, "OUTPUT_DIR", str(folder)], splits=())


def sections(path):
    """{title: HTML} of a page."""
    found = re.findall(r'<section id="[^"]+">\n<h2>(.*?)</h2>\n(.*?)\n</section>', path.read_text(), re.DOTALL)
    return dict(found)


def reasons(path):
    """{title: sentence} of what is left out."""
    found = {title: re.search(r'class="left-out">(.*?)</p>', body, re.DOTALL) for title, body in sections(path).items()}
    return {title: match[1] for title, match in found.items() if match}


def test_a_whole_report_holds_everything_and_needs_no_other_file(folder, report):
    path = report
    assert path == folder / "report" / "index.html"
    text, parts = path.read_text(), sections(path)
    assert list(parts) == TITLES
    assert reasons(path) == {}
    assert path.stat().st_size < LIMIT
    pictures = re.findall(r'src="([^"]{0,30})', text)
    assert len(pictures) >= 12
    assert all(x.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for x in pictures)
    assert "<script" not in text
    assert not re.search(r'(?:href|src)="(?!#|data:)', text)
    for data in re.findall(r"base64,([^\"]+)", text):
        Image.open(BytesIO(base64.b64decode(data))).verify()
    assert "SEED" in parts["Command"]
    assert "operator on cpu" in parts["Installation"]


def test_the_table_has_the_last_values_of_metrics_json(copied, quick):
    made, cfg = copied
    lines = [json.loads(line) for line in (made / "metrics.json").read_text().splitlines()]
    last = [x for x in lines if "bbox/AP" in x][-1]
    for i, key in enumerate(sorted(key for key in last if "bbox/" in key)):  # of random weights they are nearly equal
        last[key] = 10.0 + i
    (made / "metrics.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    rows = re.findall(r"<tr><td>(.*?)</tr>", sections(write_report(cfg))["Results"])
    cells = {re.split(r"\s*<", row)[0]: re.findall(r">\s*([\d.]+|nan)\s*<", row) for row in rows}
    names = ("AP", "AP50", "AP75", "APs", "APm")
    for prefix, row in (("", "shapes_val"), ("ema/", "ema")):
        expected = [last[f"{prefix}bbox/{name}"] for name in names]
        assert [float(x) for x in cells[row]][: len(names)] == pytest.approx(expected, abs=5e-3)


def test_precision_and_recall_are_those_of_the_evaluation(folder):
    found = read_precision_recall(folder / "inference", "bbox")
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    last = [x for x in lines if "bbox/AP" in x][-1]
    assert 100 * found.mean().mean() == pytest.approx(last["bbox/AP"], abs=1e-4)
    assert 100 * found.mean_at(0.5).mean() == pytest.approx(last["bbox/AP50"], abs=1e-4)
    assert found.classes == ["circle", "rectangle", "triangle"]


def test_ground_truth_and_predictions_are_those_of_the_files(folder):
    evaluated = read_evaluated(config(folder), folder / "inference")
    entries = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    assert sum(map(len, evaluated.found)) == len(entries)
    first = next(i for i, record in enumerate(evaluated.records) if record["image_id"] == entries[0]["image_id"])
    x, y, width, height = entries[0]["bbox"]
    assert any(np.allclose(box, (x, y, x + width, y + height)) for box in evaluated.found[first].xyxy)
    objects = sum(len(record["annotations"]) for record in evaluated.records)
    assert sum(map(len, evaluated.truths)) == objects


@pytest.mark.parametrize("enabled", [True, False])
def test_images_without_annotations_are_named_where_they_were_used(copied, quick, enabled):
    made, _ = copied
    cfg = config(made, "SEMI_SUPERVISED.ENABLED", enabled, "DATASETS.UNLABELED", ["cells/not_annotated"])
    text = sections(write_report(cfg))["Results"]
    assert "shapes_train" in text
    assert ("cells/not_annotated" in text) == enabled


def test_a_report_without_evaluations_says_so(tmp_path, quick):
    cfg = make_cfg(tmp_path / "out", "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ())
    train(cfg)
    found = reasons(write_report(cfg))
    assert "no evaluations" in found["Results"]
    assert set(found) >= {"Results", "Classes", "Precision and recall", "Confusion matrix", "Best and worst images"}
    assert "DATASETS.TEST" in found["Confusion matrix"]
    assert "Losses" not in found
    assert "Noised boxes restored" not in found  # on an image of DATASETS.TRAIN


def test_what_a_model_does_not_have_is_left_out_in_one_line(copied, quick):
    folder, cfg = copied
    cfg.MODEL.DN_DETR.DENOISING.NAME = ""
    (folder / "model_final.pth").unlink()
    (folder / "log.txt").unlink()
    (folder / "inference" / "precision_recall_bbox.npz").unlink()
    cfg.DATASETS.TEST = ("shapes_train",)
    found = reasons(write_report(cfg))
    assert naming("DENOISING.NAME").search(found["Noised boxes restored"])
    assert "log.txt" in found["Command"]
    assert "Precision and recall" in found
    assert all(x.count(".") >= 1 and "\n" not in x for x in found.values())


def test_panoptic_and_semantic_results_are_shown(copied, quick):
    folder, cfg = copied
    shutil.rmtree(folder / "inference")
    values = {
        "panoptic_seg/PQ": 30.0,
        "panoptic_seg/SQ": 80.0,
        "sem_seg/mIoU": 44.0,
        "sem_seg/IoU-sky": 70.0,
        "sem_seg/ACC-sky": 1,
    }
    (folder / "metrics.json").write_text(json.dumps({"iteration": 3, "loss_main": 1.0} | values) + "\n")
    parts = sections(write_report(cfg))
    assert all(x in parts["Results"] for x in ("30.00", "80.00", "44.00"))
    assert "ACC-sky" not in parts["Results"]
    assert "IoU of sem_seg" in parts["Classes"]


@pytest.mark.parametrize(("file", "content", "named"), [
    ("metrics.json", '{"iteration": 1, "x": 2}\nnonsense\n{"iteration": 2}\n', ["metrics.json", "line 2"]),
    ("metrics.json", "", ["metrics.json"]),
    ("metrics.json", None, ["metrics.json"]),
    ("inference/coco_instances_results.json", "[{", ["coco_instances_results.json"]),
    ("inference/coco_instances_results.json", '[{"image_id": 1, "bbox": [1]}]', ["coco_instances_results.json"]),
    ("inference/coco_instances_results.json", '{"a": 1}', ["coco_instances_results.json"]),
    ("inference/coco_instances_results.json",
     '[{"image_id": 1, "category_id": 1, "score": NaN, "bbox": [1, 1, 1, 1]}]', ["coco_instances_results.json", "nan"]),
    ("inference/precision_recall_bbox.npz", "PK", ["precision_recall_bbox.npz"]),
])  # fmt: skip
def test_a_damaged_file_is_named(copied, quick, capsys, file, content, named):
    folder, _ = copied
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    assert make_report.main(["--config-file", str(folder / "config.yaml"), "OUTPUT_DIR", str(folder)]) == 2
    said = capsys.readouterr().err
    assert naming(*named).search(said)
    assert said.count("error:") == 1
    assert not (folder / "report" / "index.html").exists()


def test_predictions_of_another_data_set_are_not_drawn(copied, quick):
    folder, cfg = copied
    path = folder / "inference" / "coco_instances_results.json"
    path.write_text('[{"image_id": 98765, "category_id": 1, "score": 0.5, "bbox": [1, 1, 1, 1]}]')
    with pytest.raises(DatasetError, match=naming(98765, "'shapes_val'")):
        read_evaluated(cfg, folder / "inference")
    assert "98765" in reasons(write_report(cfg))["Best and worst images"]


def boxes(*rows, scores=None):
    rows = np.array(rows, float).reshape(-1, 5)
    confidence = np.ones(len(rows)) if scores is None else np.array(scores)
    return sv.Detections(rows[:, :4], class_id=rows[:, 4].astype(int), confidence=confidence)


@pytest.mark.parametrize(("truth", "found", "expected"), [
    ([], [], 1.0), ([(0, 0, 10, 10, 0)], [], 0.0), ([], [(0, 0, 10, 10, 0)], 0.0),
    ([(0, 0, 10, 10, 0)], [(0, 0, 10, 10, 0)], 1.0), ([(0, 0, 10, 10, 0)], [(0, 0, 10, 10, 1)], 0.0),
    ([(0, 0, 10, 10, 0)], [(0, 0, 10, 8, 0), (50, 50, 60, 60, 0)], 0.8 / 1.5),
    ([(0, 0, 10, 10, 0), (20, 0, 30, 10, 1)], [(0, 0, 10, 10, 0), (20, 0, 30, 4, 1)], 1 / (1 + 0.5 + 0.5)),
])  # fmt: skip
def test_the_quality_of_an_image_is_its_panoptic_quality(truth, found, expected):
    assert quality(boxes(*truth), boxes(*found)) == pytest.approx(expected)


def test_the_score_from_which_detections_are_shown_is_that_of_the_best_f1():
    recalls = np.linspace(0, 1, 101)
    precision = np.where(recalls <= 0.6, 1.0, 0.1)[None, :, None].repeat(3, 2)
    precision[..., 2] = -1  # a class without objects
    scores = np.stack([1 - recalls, 1 - recalls / 2, np.zeros(101)], 1)[None]
    found = PrecisionRecall(np.array([0.5]), recalls, ["a", "b", "c"], precision, scores)
    assert found.with_objects() == [0, 1]
    assert found.best_score() == pytest.approx((0.4 + 0.7) / 2)


def test_names_of_users_are_text_on_the_page():
    text = page("<b>", [Section("A & B", table([["<i>", 1.234]], ["<u>", "n\udc80"]))])
    assert all(x in text for x in ("&lt;b&gt;", "A &amp; B", "&lt;i&gt;", "&lt;u&gt;", "1.23", "\\udc80"))


def test_dollar_signs_in_names_are_no_formula():
    """Two of them began one, and a name that is none in TeX ended the whole report."""
    names = {"a$5_$b": 1.0, "$": 2.0, "$x$": 3.0}
    assert drawing(class_bars(names, "AP"), "AP by class").startswith("<figure>")


def test_a_failing_report_is_logged_and_does_not_fail_the_training(copied, caplog):
    folder, cfg = copied
    cfg.REPORT = "auto"
    (folder / "metrics.json").write_text("nonsense\nmore\n")
    report_after_training(cfg)
    assert [naming("metrics.json", "line 1", "make_report.py").search(x) is not None for x in caplog.messages] == [True]
    assert caplog.records[0].levelname == "ERROR"


@pytest.mark.parametrize(("wanted", "possible", "written", "said"), [
    ("auto", True, True, 0), ("auto", False, False, 1), ("never", True, False, 0), ("never", False, False, 0),
])  # fmt: skip
def test_when_a_report_is_written(copied, monkeypatch, caplog, wanted, possible, written, said):
    _, cfg = copied
    cfg.REPORT = wanted
    monkeypatch.setattr(at_end, "report_is_possible", lambda: possible)
    made = []
    monkeypatch.setattr("dn_detr_d2.report.build.write_report", made.append)
    with caplog.at_level("INFO", "dn_detr_d2"):
        announce(cfg)
        assert len(caplog.messages) == said
        report_after_training(cfg)
    assert len(made) == written


def test_the_program_names_the_extra(folder, monkeypatch, capsys):
    monkeypatch.setattr(extras, "is_installed", lambda name: name != "supervision")
    assert make_report.main(["--config-file", str(folder / "config.yaml")]) == 2
    assert "dn_detr_d2[report]" in capsys.readouterr().err


@pytest.mark.long
def test_a_training_ends_with_a_report(tmp_path):
    cfg = make_cfg(tmp_path / "made")
    line = ["--config-file", str(ROOT / "configs" / f"{SYSTEMS['dn_detr']}.yaml")]
    flat = [x for key, value in extras_flat(cfg) for x in (key, str(value))]
    assert main([*line, *flat, "REPORT", "always", "OUTPUT_DIR", str(tmp_path / "out")]) == 0
    parts = sections(tmp_path / "out" / "report" / "index.html")
    assert list(parts) == TITLES
    assert str(tmp_path / "out") in parts["Command"]


def extras_flat(cfg):
    from dn_detr_d2.config.ranges import flatten

    default = dict(flatten(setup_cfg(str(ROOT / "configs" / f"{SYSTEMS['dn_detr']}.yaml"), splits=())))
    return [(key, value) for key, value in flatten(cfg) if value != default[key]]


@pytest.mark.long
def test_a_browser_shows_the_report(report, tmp_path):
    assert CHROMIUM, "the report is to be looked at in a browser: apt install chromium, or deselect this test"
    path = report
    options = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    seen = subprocess.run([*options, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert re.findall(r"<h2>(.*?)</h2>", seen) == TITLES
    shot = tmp_path / "page.png"
    subprocess.run(
        [*options, "--window-size=1200,6000", "--hide-scrollbars", f"--screenshot={shot}", path.as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape == (6000, 1200, 3)
    drawn = [(pixels[i : i + 500] != 255).any(-1).mean() for i in range(0, 5000, 500)]
    assert min(drawn) > 0.02  # something stands in each part of it: pictures have their sizes


def test_a_user_error_is_no_reason_to_leave_out_a_section():
    """Damaged files must be told; only what says that something does not apply is a line in the report."""
    assert not issubclass(UserError, DatasetError)
