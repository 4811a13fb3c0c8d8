import json
import math

import pytest
import torch
import yaml
from conftest import ROOT, make_batch, valid_coco
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.events import EventStorage
from naming import naming
from PIL import Image

from dn_detr_d2 import ConfigError, DatasetError, add_dn_detr_config, setup_cfg
from dn_detr_d2.config.ranges import CHECKS, flatten

CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if not p.name.startswith("Base"))
HERE = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATASETS.COCO_JSON", []]
NO_DATA = [*HERE, "DATASETS.TRAIN", (), "DATASETS.TEST", (), "MODEL.DN_DETR.NUM_CLASSES", 5]


def different_models():
    """The first config of each model: others differ from it in their schedule or their data set."""
    first = {}
    for path in CONFIGS:
        cfg = setup_cfg(str(path), NO_DATA)
        first.setdefault((cfg.MODEL.dump(), cfg.TEST.DETECTIONS_PER_IMAGE, cfg.TEST.PAD_TO_LARGEST), path)
    return list(first.values())


def narrower(path):
    """Options that leave a model its parts and make them small."""
    backbone = {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4}
    if setup_cfg(str(path), NO_DATA).MODEL.RESNETS.DEPTH < 50:
        backbone = {}  # Detectron2 has these in one width
    options = [x for key, value in backbone.items() for x in (f"MODEL.RESNETS.{key}", value)]
    options += ["MODEL.SWIN.SIZE", "T", "MODEL.DN_DETR.HIDDEN_DIM", 64]
    options += ["MODEL.DN_DETR.MASK.NUM_POINTS", 64]
    return [*options, "MODEL.DN_DETR.ENCODER.FFN_DIM", 64, "MODEL.DN_DETR.DECODER.FFN_DIM", 64]


@pytest.mark.parametrize("path", [p for p in CONFIGS if "Swin" not in p.stem], ids=lambda p: p.stem)
def test_every_config_builds_in_its_own_size(path):
    """On the device that has shapes and no numbers; Detectron2's Swin reads numbers while it is built."""
    cfg = setup_cfg(str(path), NO_DATA)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(cfg).parameters()) > 10**6


@pytest.mark.parametrize("narrow", [True, pytest.param(False, marks=pytest.mark.long)], ids=["narrow", "as it is"])
@pytest.mark.parametrize("path", different_models(), ids=lambda p: p.stem)
def test_every_model_of_the_configs_builds_and_trains_one_step_and_predicts(path, narrow):
    cfg = setup_cfg(str(path), [*NO_DATA, *(narrower(path) if narrow else ())])
    model = build_model(cfg)
    batch = make_batch(2, 0, sizes=((64, 64),), masks=cfg.MODEL.DN_DETR.MASK.ENABLED)
    with EventStorage():  # which Detectron2's own detectors log to
        losses = model.train()(batch)
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert len(model.eval()(batch)) == 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_begins_with_what_it_is_and_its_command(path):
    first = path.read_text().split("_BASE_")[0]
    assert first.startswith("# ")
    assert f"configs/{path.name}" in first or "make quickstart" in first


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_also_works_with_detectron2s_own_functions(path):
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.merge_from_list(["MODEL.DN_DETR.NUM_CLASSES", 3])
    assert ("GeneralizedRCNN" if "rcnn" in path.stem else "DenoisingDETR") == cfg.MODEL.META_ARCHITECTURE


def test_config_survives_a_round_trip_through_yaml(tmp_path):
    cfg = setup_cfg(str(CONFIGS[0]), NO_DATA)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = setup_cfg(str(tmp_path / "config.yaml"))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
    assert yaml.safe_load(cfg.dump())["MODEL"]["DN_DETR"]["NUM_CLASSES"] == 5


def test_auto_is_the_number_of_classes_of_the_training_set():
    cfg = setup_cfg("", ["DATASETS.TRAIN", ("shapes_train",), "MODEL.DN_DETR.NUM_CLASSES", "auto"])
    assert cfg.MODEL.DN_DETR.NUM_CLASSES == 3
    assert cfg.MODEL.DN_DETR.CLASS_NAMES == ["circle", "rectangle", "triangle"]


def test_auto_in_a_file_can_be_overridden_by_a_number_and_back(tmp_path):
    (tmp_path / "x.yaml").write_text("MODEL: {DN_DETR: {NUM_CLASSES: auto}}\nDATASETS: {TRAIN: ['shapes_train']}\n")
    assert setup_cfg(str(tmp_path / "x.yaml")).MODEL.DN_DETR.NUM_CLASSES == 3
    assert setup_cfg(str(tmp_path / "x.yaml"), ["MODEL.DN_DETR.NUM_CLASSES", 3]).MODEL.DN_DETR.NUM_CLASSES == 3
    (tmp_path / "x.yaml").write_text("MODEL: {DN_DETR: {NUM_CLASSES: 7}}\nDATASETS: {TRAIN: ['shapes_train']}\n")
    assert setup_cfg(str(tmp_path / "x.yaml"), ["MODEL.DN_DETR.NUM_CLASSES", "auto"]).MODEL.DN_DETR.NUM_CLASSES == 3


def test_a_users_set_from_the_config(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    image = {"id": 1, "file_name": "a.png", "height": 8, "width": 8}
    content = {"images": [image], "annotations": [], "categories": [{"id": 40, "name": "cell"}]}
    (tmp_path / "set.json").write_text(json.dumps(content))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    listed = [["test_cells", "set.json", "."]]
    cfg = setup_cfg("", ["DATASETS.COCO_JSON", listed, "DATASETS.TRAIN", ("test_cells",)])
    assert (cfg.MODEL.DN_DETR.NUM_CLASSES, cfg.MODEL.DN_DETR.CLASS_NAMES) == (1, ["cell"])


@pytest.mark.parametrize(
    ("opts", "named"),
    [
        (["MODEL.DN_DETR.NUM_QUERY", 3], ["MODEL.DN_DETR.NUM_QUERY", "MODEL.DN_DETR.NUM_QUERIES"]),
        (["MODEL.DN_DETR.NUM_QUERIES", "many"], ["MODEL.DN_DETR.NUM_QUERIES", "int", "str"]),
        (["SOLVER.IMS_PER_BATCH", 0], ["SOLVER.IMS_PER_BATCH", 0]),
        (["SOLVER.BASE_LR", -1.0], ["SOLVER.BASE_LR", -1.0]),
        (["MODEL.DN_DETR.LOSS.FOCAL_GAMMA", 0.5], ["MODEL.DN_DETR.LOSS.FOCAL_GAMMA", 0.5, "at least 1"]),
        (["MODEL.DN_DETR.LOSS.FOCAL_GAMMA", -1.0], ["MODEL.DN_DETR.LOSS.FOCAL_GAMMA", -1.0]),
        (["SOLVER.OPTIMIZER", "LAMB"], ["SOLVER.OPTIMIZER", "'LAMB'", "'ADAMW'"]),
        (["SOLVER.AMP.DTYPE", "fp8"], ["SOLVER.AMP.DTYPE", "'fp8'", "'bf16'"]),
        (["INPUT.CROP.TYPE", "relative"], ["INPUT.CROP.TYPE", "'relative'", "'absolute_range'"]),
        (["DATASETS.COCO_JSON", [["a", "b"]]], ["DATASETS.COCO_JSON", "['a', 'b']"]),
        (["DATASETS.TRAIN", ("shapes_trian",)], ["'shapes_trian'", "'shapes_train'"]),
        (["DATASETS.TRAIN", ("shapes_train", "coco_2017_val")], ["shapes_train", "coco_2017_val"]),
        (
            ["DATASETS.TRAIN", ("shapes_train",), "MODEL.DN_DETR.NUM_CLASSES", 2],
            ["NUM_CLASSES", 2, "shapes_train", 3],
        ),
        (
            ["DATASETS.TRAIN", ("shapes_train",), "MODEL.DN_DETR.NUM_CLASSES", 91],
            ["NUM_CLASSES", 91, "shapes_train", 3],
        ),
        (["MODEL.DN_DETR.NUM_CLASSES", "many"], ["NUM_CLASSES", "'many'", "auto"]),
        (["DATASETS.COCO_JSON", [3]], ["DATASETS.COCO_JSON", 3]),
        (["MODEL.DEVICE", "gpu"], ["MODEL.DEVICE", "'gpu'", "cpu", "cuda"]),
        (["SOLVER.CHECKPOINT_PERIOD", 0], ["SOLVER.CHECKPOINT_PERIOD", 0]),
        (["SOLVER.BASE_LR.X", 1], ["SOLVER.BASE_LR.X", "SOLVER.BASE_LR is"]),
        (["SOLVER.WARMUP_FACTOR", -3.0], ["SOLVER.WARMUP_FACTOR", -3.0]),
        (["SOLVER.GAMMA", -1.0], ["SOLVER.GAMMA", -1.0]),
        (["SOLVER.NUM_DECAYS", 0], ["SOLVER.NUM_DECAYS", 0]),
        (["SOLVER.STEPS", (-3,)], ["SOLVER.STEPS", "(-3,)"]),
        (["SOLVER.STEPS", (5, 3)], ["SOLVER.STEPS", "(5, 3)"]),
        (["SOLVER.STEPS", (5, 5)], ["SOLVER.STEPS", "(5, 5)"]),
        (["SOLVER.STEPS", (0, 5)], ["SOLVER.STEPS", "(0, 5)"]),
        (["SOLVER.STEPS", (1.5,)], ["SOLVER.STEPS", "(1.5,)"]),
        (["SOLVER.STEPS", (3, 9), "SOLVER.MAX_ITER", 9], ["SOLVER.STEPS", "SOLVER.MAX_ITER", 9]),
        (["SOLVER.WARMUP_METHOD", "cubic"], ["SOLVER.WARMUP_METHOD", "'cubic'", "'linear'"]),
        (["SOLVER.LR_SCHEDULER_NAME", "Cosine"], ["SOLVER.LR_SCHEDULER_NAME", "'Cosine'", "'WarmupCosineLR'"]),
        (
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", 0.5],
            ["SOLVER.BASE_LR_END", "SOLVER.BASE_LR", 0.0001, 0.5],
        ),
        (["SOLVER.BASE_LR_END", -0.1], ["SOLVER.BASE_LR_END", -0.1]),
        (["DATALOADER.NUM_WORKERS", -1], ["DATALOADER.NUM_WORKERS", -1]),
        (["INPUT.MIN_SIZE_TRAIN", (0,)], ["INPUT.MIN_SIZE_TRAIN", "(0,)"]),
        (["INPUT.MIN_SIZE_TRAIN", ()], ["INPUT.MIN_SIZE_TRAIN", "()"]),
        (["INPUT.MIN_SIZE_TRAIN", (800, -1)], ["INPUT.MIN_SIZE_TRAIN", "(800, -1)"]),
        (["INPUT.MAX_SIZE_TRAIN", 0], ["INPUT.MAX_SIZE_TRAIN", 0]),
        (["INPUT.MAX_SIZE_TEST", -1], ["INPUT.MAX_SIZE_TEST", -1]),
        (["INPUT.MIN_SIZE_TEST", -1], ["INPUT.MIN_SIZE_TEST", -1]),
        (["INPUT.RANDOM_FLIP", "sideways"], ["INPUT.RANDOM_FLIP", "'sideways'", "'both'"]),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "any"], ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "'any'", "'range'"]),
        *(
            (
                ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", sizes],
                ["INPUT.MIN_SIZE_TRAIN", "'range'", sizes],
            )
            for sizes in [(800,), (800, 640), (480, 640, 800)]
        ),
        ([], ["NUM_CLASSES", "'auto'", "DATASETS"]),
    ],
)
def test_mistakes_are_one_sentence_with_the_key(opts, named):
    with pytest.raises(ConfigError, match=naming(*named)) as caught:
        setup_cfg("", opts)
    assert "\n" not in str(caught.value)


SCHEDULES = [
    ["SOLVER.STEPS", ()],
    ["SOLVER.STEPS", (3, 90), "SOLVER.MAX_ITER", 9],
    ["SOLVER.STEPS", (9,), "SOLVER.MAX_ITER", 9, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"],
    ["SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR"],
    ["SOLVER.WARMUP_METHOD", "constant", "SOLVER.WARMUP_FACTOR", 0.0, "SOLVER.WARMUP_ITERS", 3],
]


@pytest.mark.parametrize("opts", SCHEDULES)
def test_a_schedule_that_passes_the_door_is_one_that_detectron2_builds(opts):
    cfg = setup_cfg("", [*NO_DATA, *opts])
    rates = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR)
    build_lr_scheduler(cfg, rates)
    assert 0 <= rates.param_groups[0]["lr"] <= cfg.SOLVER.BASE_LR


def test_detectron2s_own_values_pass_the_door():
    theirs = flatten(get_cfg())
    same_kind = (
        "SOLVER.STEPS",
        "SOLVER.MAX_ITER",
        "SOLVER.GAMMA",
        "SOLVER.WARMUP",
        "INPUT.M",
        "DATALOADER.NUM_WORKERS",
    )
    opts = [part for key, value in theirs if key.startswith(same_kind) for part in (key, value)]
    assert len(opts) >= 2 * 12
    setup_cfg("", [*NO_DATA, *opts])


def test_a_missing_config_file_is_named():
    with pytest.raises(ConfigError, match=naming("'nowhere.yaml'")):
        setup_cfg("nowhere.yaml")


def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path):
    (tmp_path / "x.yaml").write_text("MODEL:\n  DN_DETR:\n    HIDEN_DIM: 3\n")
    with pytest.raises(ConfigError, match=naming("MODEL.DN_DETR.HIDEN_DIM", "MODEL.DN_DETR.HIDDEN_DIM")):
        setup_cfg(str(tmp_path / "x.yaml"))


@pytest.mark.parametrize("name", ["dn_detr_R50_50ep", "dn_detr_R50_50ep.yaml"])
def test_a_base_is_beside_the_file_or_in_the_model_zoo(tmp_path, monkeypatch, name):
    """As outside of a checkout; what is beside the file comes first, what is in the current folder does not matter."""
    (tmp_path / "own").mkdir()
    (tmp_path / name).write_text("MODEL: {DN_DETR: {NUM_QUERIES: 13}}\n")
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own" / "x.yaml"
    own.write_text(f"_BASE_: {name}\nMODEL: {{DN_DETR: {{NUM_CLASSES: 5}}}}\n")
    assert setup_cfg(str(own), NO_DATA).MODEL.DN_DETR.NUM_QUERIES == 300
    (tmp_path / "own" / name).write_text("MODEL: {DN_DETR: {NUM_QUERIES: 17}}\n")
    assert setup_cfg(str(own), NO_DATA).MODEL.DN_DETR.NUM_QUERIES == 17


@pytest.mark.parametrize("text", ["a: [", "", "MODEL:", "_BASE_: gone.yaml", "- 1", "MODEL: 3"])
def test_a_file_that_is_no_config_is_one_sentence(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        setup_cfg(str(tmp_path / "x.yaml"))
    assert "\n" not in str(caught.value)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=naming("MODEL.DEVICE", "'cuda'", "MODEL.DEVICE cpu")):
        setup_cfg("", ["MODEL.DEVICE", "cuda", "MODEL.DN_DETR.NUM_CLASSES", 3])


def test_inference_needs_no_data(tmp_path):
    opts = ["DATASETS.COCO_JSON", [["test_gone", str(tmp_path / "gone.json"), "."]], "MODEL.DN_DETR.NUM_CLASSES", 3]
    opts += ["DATASETS.TRAIN", ("test_gone",), "DATASETS.TEST", ("shapes_val",)]
    assert setup_cfg("", opts, splits=()).MODEL.DN_DETR.NUM_CLASSES == 3
    assert setup_cfg("", opts, splits=("TEST",)).MODEL.DN_DETR.CLASS_NAMES == ["circle", "rectangle", "triangle"]
    with pytest.raises(DatasetError, match=r"gone\.json"):
        setup_cfg("", opts)


def test_every_published_config_has_a_row_in_the_model_zoo():
    zoo = (ROOT / "MODEL_ZOO.md").read_text()
    without_a_row = [p.stem for p in CONFIGS if f"| [{p.stem}](configs/{p.name}) |" not in zoo]
    assert without_a_row == ["bccd", "bccd_scratch", "quickstart"]  # for other data than COCO; named in a sentence
    assert [name for name in without_a_row if f"`configs/{name}.yaml`" not in zoo] == []
    rows = [line.split("]")[0].removeprefix("| [") for line in zoo.splitlines() if line.startswith("| [")]
    assert [row for row in rows if not (ROOT / "configs" / f"{row}.yaml").exists()] == []


def own_keys():
    """{key: default} of what this project adds to Detectron2."""
    theirs, ours = get_cfg(), get_cfg()
    add_dn_detr_config(ours)
    known = dict(flatten(theirs))
    return {key: value for key, value in flatten(ours) if key not in known or known[key] != value}


def test_no_number_of_ours_may_be_nan_or_an_integer_beyond_all_tensors():
    for key, value in own_keys().items():
        for bad in [math.nan] * isinstance(value, float) + [1 << 70] * (type(value) is int):
            with pytest.raises(ConfigError, match=key):
                setup_cfg("", [key, bad, "MODEL.DN_DETR.NUM_CLASSES", 3])


@pytest.mark.parametrize("key", [key for keys, must, _ in CHECKS for key in keys])
def test_a_value_out_of_its_range_is_refused_with_key_and_value(key):
    value = own_keys().get(key, 1)
    bad = [math.inf] if isinstance(value, float) else [[-1]] if isinstance(value, list | tuple) else [-1]
    for nonsense in [*bad, None]:
        with pytest.raises(ConfigError, match=key):
            setup_cfg("", [key, nonsense, "MODEL.DN_DETR.NUM_CLASSES", 3])


def listed(name, folder, names):
    """A one-image data set whose categories have these names in this order, as an entry of DATASETS.COCO_JSON."""
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 32, "width": 32}],
        "categories": [{"id": 10 * i + 3, "name": x} for i, x in enumerate(names)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [4, 4, 9, 9]}],
    }
    (folder / f"{name}.json").write_text(json.dumps(content))
    return [name, str(folder / f"{name}.json"), str(folder)]


@pytest.fixture
def classes_of(tmp_path):
    """classes_of({data set: names}, train, test, *opts) -> CLASS_NAMES; the sets are forgotten afterwards."""
    made = []

    def make(sets, train, test, *opts, splits=("TRAIN", "TEST")):
        known = {name: f"{name}_{tmp_path.name}" for name in sets}
        made.extend(known.values())
        entries = [listed(known[name], tmp_path, names) for name, names in sets.items()]
        used = ["DATASETS.TRAIN", tuple(known[x] for x in train), "DATASETS.TEST", tuple(known[x] for x in test)]
        given = ["MODEL.DN_DETR.NUM_CLASSES", "auto", "DATASETS.COCO_JSON", entries, *used, *opts]
        return list(setup_cfg("", given, splits=splits).MODEL.DN_DETR.CLASS_NAMES)

    yield make
    for name in set(made) & set(DatasetCatalog.list()):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_classes_are_the_same_if_their_names_are(classes_of):
    sets = {"a": ["cat", "dog", "eel"], "swapped": ["eel", "cat", "dog"], "fewer": ["dog"]}
    assert classes_of(sets, ["a"], ["swapped"]) == ["cat", "dog", "eel"]
    assert classes_of(sets, ["swapped"], ["a", "fewer"]) == ["eel", "cat", "dog"]
    assert classes_of(sets, ["fewer", "a"], []) == ["cat", "dog", "eel"]
    assert classes_of(sets, [], ["fewer", "swapped"], splits=("TEST",)) == ["dog", "eel", "cat"]


def test_the_order_of_a_finished_training_is_kept(classes_of):
    """Its config.yaml has CLASS_NAMES and their number; a training on other classes does not keep them."""
    sets = {"a": ["cat", "dog", "eel"], "fewer": ["dog"], "other": ["fox", "cat"]}
    order = ["MODEL.DN_DETR.CLASS_NAMES", ["eel", "dog", "cat"]]
    number = ["MODEL.DN_DETR.NUM_CLASSES", 3]
    assert classes_of(sets, ["a"], ["fewer"], *order) == ["eel", "dog", "cat"]
    assert classes_of(sets, [], ["fewer"], *order, *number, splits=("TEST",)) == ["eel", "dog", "cat"]
    assert classes_of(sets, ["fewer"], [], *order) == ["dog"]
    assert classes_of(sets, ["other"], [], *order) == ["fox", "cat"]


def test_a_validation_set_with_classes_that_nobody_trains_names_both_files(classes_of):
    sets = {"a": ["cat", "dog"], "more": ["fox", "dog", "cat"]}
    with pytest.raises(ConfigError, match=r"a_.*\['cat', 'dog'\].*more_.*\['fox'\]"):
        classes_of(sets | {"more": ["fox", "dog", "cat"]}, ["a"], ["more"])  # its object is of the first class
    assert classes_of(sets | {"unused": ["dog", "cat", "fox"]}, ["a"], ["unused"]) == ["cat", "dog"]
    assert classes_of(sets | {"mended": ["cat", "dog", "fox"]}, ["mended"], ["more"]) == ["cat", "dog", "fox"]


@pytest.mark.parametrize("num_classes", ["auto", 2])
def test_own_training_data_with_the_test_set_of_the_base_have_a_way_out_that_works(tmp_path, num_classes):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "b.png")
    (tmp_path / "set.json").write_text(json.dumps(valid_coco()))
    name = f"own_{tmp_path.name}"
    opts = ["DATASETS.COCO_JSON", [[name, str(tmp_path / "set.json"), str(tmp_path)]], "DATASETS.TRAIN", (name,)]
    opts += ["MODEL.DN_DETR.NUM_CLASSES", num_classes, "MODEL.DEVICE", "cpu"]
    config = str(ROOT / "configs" / "dn_detr_R50_12ep.yaml")
    with pytest.raises(ConfigError, match=naming("coco_2017_val", "DATASETS.TEST", '"()"')):
        setup_cfg(config, opts)
    assert setup_cfg(config, [*opts, "DATASETS.TEST", "()"]).MODEL.DN_DETR.CLASS_NAMES == ["cat", "dog"]


@pytest.mark.parametrize("digits", ["12345678", "1234e567", "0x123456", "01234567", 12345678, "8d5c2f0a", "'12345678'"])
def test_digits_of_a_sum_are_text(digits):
    """Of a SHA-256, 3 % of the first eight digits are a number for yacs."""
    cfg = setup_cfg("", [*NO_DATA, "MODEL.WEIGHTS_SHA256", digits])
    assert str(digits).strip("'") == cfg.MODEL.WEIGHTS_SHA256


def test_a_number_for_a_text_in_a_file_is_told_how_it_is_written(tmp_path):
    (tmp_path / "x.yaml").write_text("MODEL: {WEIGHTS_SHA256: 12345678}\n")
    with pytest.raises(ConfigError, match=naming("MODEL.WEIGHTS_SHA256", "quotes")):
        setup_cfg(str(tmp_path / "x.yaml"), NO_DATA)
