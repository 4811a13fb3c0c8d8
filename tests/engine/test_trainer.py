"""The trainer on the embedded data set: a few iterations of a toy model, on this CPU."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import make_batch
from detectron2.utils.events import EventStorage
from gradients import HIDDEN, QUIET, in_float64
from naming import naming
from ranks import on_ranks

from dev.benchmark_criterion import OperatorCount
from dn_detr_d2 import CheckpointError, ConfigError
from dn_detr_d2.engine import (
    BestCheckpointer,
    Checkpointer,
    TolerantCOCOEvaluator,
    Trainer,
    TrainStep,
    check_processes,
    evaluate,
)

SMALL = [
    *("DATASETS.TRAIN", ("shapes_train",), "DATASETS.TEST", ("shapes_val",), "DATALOADER.NUM_WORKERS", 0),
    *("MODEL.DN_DETR.NUM_CLASSES", "auto", "INPUT.MIN_SIZE_TRAIN", (48,), "INPUT.MIN_SIZE_TEST", 48),
    *("INPUT.CROP.ENABLED", False, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (3,)),
    *("SOLVER.CHECKPOINT_PERIOD", 2, "SEED", 7, "MODEL.DN_DETR.DECODER.NUM_LAYERS", 2),
]


@pytest.fixture
def cfg(toy_cfg, tmp_path):
    return toy_cfg("dn_detr", *SMALL, "OUTPUT_DIR", str(tmp_path / "out"))


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(trainer, config) of one whole training with evaluation at its end."""
    from conftest import ROOT, SYSTEMS, TOY

    from dn_detr_d2 import setup_cfg

    folder = str(tmp_path_factory.mktemp("trained"))
    cfg = setup_cfg(str(ROOT / "configs" / f"{SYSTEMS['dn_detr']}.yaml"), [*TOY, *SMALL, "OUTPUT_DIR", folder])
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer, cfg


def test_training_leaves_checkpoints_metrics_and_an_evaluation(trained):
    _, cfg = trained
    folder = Path(cfg.OUTPUT_DIR)
    names = {p.name for p in folder.iterdir()}
    assert {"model_0000001.pth", "model_final.pth", "model_best.pth", "metrics.json", "last_checkpoint"} <= names
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert any(name.startswith("events.out.tfevents") for name in names)
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    logged = {key for line in lines for key in line}
    assert {"total_loss", "loss_main", "loss_aux", "loss_dn", "main/class", "aux/l1_0", "dn/giou", "bbox/AP"} <= logged


def test_eval_only_equals_the_evaluation_of_the_training(trained):
    trainer, cfg = trained
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    after = evaluate(cfg)["bbox"]
    for name, value in trainer._last_eval_results["bbox"].items():
        assert after[name] == pytest.approx(value, nan_ok=True), name


PROMPTS = {
    "known objects": ["MODEL.DN_DETR.DENOISING.KNOWN_FRACTION", 0.7, "MODEL.DN_DETR.DENOISING.NUM_GROUPS", 1],
    "labels": ["MODEL.DN_DETR.DENOISING.LABEL_PROMPTS", True],
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_training_with_prompts_trains_evaluates_and_resumes(toy_cfg, tmp_path, kind):
    """With diagnostics; a resumed training draws the same labels, which the weights tell."""
    diagnostics = ["TEST.VALIDATION_LOSS", 4, "TEST.INSTABILITY.NUM_IMAGES", 4, "TEST.INSTABILITY.HEALTH_SCALES", [0.4]]
    make = functools.partial(toy_cfg, "dn_detr", *SMALL, *PROMPTS[kind], *diagnostics, "TEST.IMS_PER_BATCH", 50)
    states = []
    for name, parts in (("whole", (4,)), ("parts", (2, 4))):
        for end in parts:
            cfg = make("OUTPUT_DIR", str(tmp_path / name), "SOLVER.MAX_ITER", end)
            torch.manual_seed(0)
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=end != parts[0])
            trainer.train()
        states.append(parameters(trainer.model))
    assert all(torch.equal(a, states[1][name]) for name, a in states[0].items())
    results = trainer._last_eval_results["bbox"]
    known = PROMPTS[kind][1] == 0.7
    assert ("AP-circle" in results) == (not known)  # one unknown class: Detectron2 gives no AP of each class
    lines = [json.loads(line) for line in Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()]
    assert {"dn/giou", "main/class", "bbox/AP", "validation/total_loss"} <= {key for line in lines for key in line}


def test_checkpoints_load_with_weights_only(trained):
    state = torch.load(Path(trained[1].OUTPUT_DIR) / "model_final.pth", weights_only=True)
    assert {"model", "trainer", "iteration"} <= set(state)


def test_a_resumed_training_goes_on_from_where_it_was(trained, cfg):
    reference, done = trained
    for name in ("model_0000001.pth", "last_checkpoint"):
        target = Path(cfg.OUTPUT_DIR) / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((Path(done.OUTPUT_DIR) / name).read_bytes())
    (Path(cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000001.pth")
    saved = torch.load(Path(cfg.OUTPUT_DIR) / "model_0000001.pth", weights_only=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    assert all(torch.equal(p, saved["model"][name]) for name, p in trainer.model.named_parameters())
    moments = trainer.optimizer.state_dict()["state"]
    assert all(
        torch.equal(moments[i]["exp_avg"], state["exp_avg"])
        for i, state in saved["trainer"]["_trainer"]["optimizer"]["state"].items()
    )
    trainer.train()
    assert trainer.iter == 4
    assert trainer.scheduler.last_epoch == reference.scheduler.last_epoch == 4


def test_weights_that_lack_something_are_not_evaluated(trained, tmp_path):
    cfg = trained[1].clone()
    state = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)["model"]
    backbone = {k: v for k, v in state.items() if k.startswith("backbone.")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError, match=naming("backbone.pth")):
        evaluate(cfg)


def load_part(trained, tmp_path, least):
    """A training's start from a file with one tensor less, one more and one of another shape."""
    cfg = trained[1].clone()
    state = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)["model"]
    state = {name: x + 1 if x.is_floating_point() else x for name, x in state.items()}
    gone, wrong = "query_source.anchors.weight", "neck.projections.0.0.weight"
    if gone not in state:
        gone = next(name for name in state if name.startswith("query_source."))
    del state[gone]
    state[wrong] = state[wrong][:-1]
    torch.save({"model": {**state, "decoder.more": torch.ones(1)}}, tmp_path / "part.pth")
    cfg.MODEL.WEIGHTS_MATCHED, cfg.OUTPUT_DIR = least, str(tmp_path / "next")
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    Checkpointer(model, cfg=cfg, new_classes=True).load(str(tmp_path / "part.pth"))
    return before, state, model.state_dict(), {gone, wrong}


def test_a_training_may_start_from_a_part_and_says_which(trained, tmp_path, caplog):
    with caplog.at_level("INFO"):
        before, state, after, absent = load_part(trained, tmp_path, 0.9)
    assert all(torch.equal(after[name], before[name] if name in absent else state[name]) for name in after)
    said = next(text for text in caplog.messages if "missing: " in text)
    number = len(after) - sum(name.endswith("num_batches_tracked") for name in after)
    assert naming(f"{number - 2} of {number}", "missing: ", *absent, "left over: decoder.more").search(said)


def test_too_small_a_part_is_refused_and_nothing_is_not_a_part(trained, tmp_path):
    with pytest.raises(CheckpointError, match=r"\d+ of \d+ tensors.*missing: .*WEIGHTS_MATCHED"):
        load_part(trained, tmp_path, 0.999)
    cfg = trained[1].clone()
    cfg.MODEL.WEIGHTS_MATCHED = 0.0
    cfg.MODEL.WEIGHTS = str(tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=naming("tensors", "missing: ")):  # an evaluation needs all
        evaluate(cfg)


def make_step(model, batch, tmp_path, dtype=None, **options):
    optimizer = torch.optim.SGD(model.parameters(), 1.0, fused=True)
    step = TrainStep(model, iter([batch] * 3), optimizer, dtype, str(tmp_path / "nan_report"), **options)
    step.iter = 5
    return step


def test_loss_sums_add_up(toy_model, tmp_path):
    step = make_step(toy_model("dn_detr"), make_batch(2, 1), tmp_path)
    with EventStorage() as storage:
        step.run_step()
        latest = {name: value for name, (value, _) in storage.latest().items()}
    for group in ("main", "aux", "dn"):
        terms = [value for name, value in latest.items() if name.startswith(f"{group}/")]
        assert latest[f"loss_{group}"] == pytest.approx(sum(terms))
    sums = latest["loss_main"] + latest["loss_aux"] + latest["loss_dn"]
    assert latest["total_loss"] == pytest.approx(sums)


def poison_class_bias(model, batch):
    model.decoder.heads.class_heads[0].bias.data[2] = math.inf


def poison_image(model, batch):
    batch[1]["image"] = torch.full((3, 64, 64), math.nan)


@pytest.mark.parametrize("poison", [poison_class_bias, poison_image])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(toy_model, tmp_path, poison):
    model, batch = toy_model("dn_detr"), make_batch(2, 1)
    poison(model, batch)
    before = parameters(model)
    step = make_step(model, batch, tmp_path)
    with (
        EventStorage(),
        pytest.raises(FloatingPointError, match=r"iteration 5, rank 0.*image_0\.png, image_1\.png"),
    ):
        step.run_step()
    after = parameters(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = torch.load(tmp_path / "nan_report" / "iteration_5_rank_0.pth", weights_only=True)
    assert torch.equal(loaded["batch"][0]["instances"]["gt_boxes"], batch[0]["instances"].gt_boxes.tensor)
    assert not step.stepped


def test_the_first_bad_loss_term_is_named(toy_model, tmp_path):
    class Losses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, batch):
            return {"main/l1": self.weight.sum(), "dn/giou_1": self.weight.sum() * math.nan}

    step = make_step(Losses(), make_batch(1), tmp_path)
    with EventStorage(), pytest.raises(FloatingPointError, match=naming("dn/giou_1", "nan")):
        step.run_step()


@pytest.mark.parametrize("system", ["dn_detr", "dn_deformable_detr", "dino", "mask2former", "mask_dino"])
def test_a_step_reads_the_device_once_whatever_the_batch(toy_model, tmp_path, monkeypatch, system):
    """One copy of matching costs, those of proposals among them; nothing else makes the host wait.

    The losses are read in the next step, see test_delayed_reading.py.
    """
    reads = []
    for name in ("cpu", "tolist"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, f=original: reads.append(1) or f(self))
    counted = []
    for counts in ((1,), (5, 0, 3)):
        batch = make_batch(*counts, masks="mask" in system)
        step = make_step(toy_model(system), batch, tmp_path, delayed=True)
        reads.clear()
        with EventStorage(), OperatorCount() as count:
            step.run_step()
        counted.append((len(reads), count.waits))
    assert counted == [(1, 0), (1, 0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("system", ["dn_detr", "dn_deformable_detr"])
def test_mixed_precision_trains_on_the_cpu(toy_model, tmp_path, system, dtype):
    model = toy_model(system)
    before = parameters(model)
    step = make_step(model, make_batch(2, 0), tmp_path, dtype)
    step.scaler._init_scale = 1.0
    with EventStorage() as storage:
        step.run_step()
        assert math.isfinite(storage.latest()["total_loss"][0])
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_best_checkpoint_survives_a_resume(cfg, monkeypatch):
    """With the trainer's own order of hooks: a worse evaluation after a resume does not overwrite the best."""
    scores = iter([50.0, 10.0])
    monkeypatch.setattr(Trainer, "test", lambda *_: {"bbox": {"AP": next(scores)}})
    cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 2])
    first = Trainer(cfg)
    first.train()
    best = (Path(cfg.OUTPUT_DIR) / "model_best.pth").read_bytes()
    cfg.SOLVER.MAX_ITER = 4
    second = Trainer(cfg)
    second.resume_or_load(resume=True)
    second.train()
    hook = next(h for h in second._hooks if isinstance(h, BestCheckpointer))
    assert (hook.best_metric, hook.best_iter) == (50.0, 2)
    assert (Path(cfg.OUTPUT_DIR) / "model_best.pth").read_bytes() == best
    assert (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_final.pth"


def test_a_training_without_fp16_resumes_with_it(toy_model, tmp_path):
    plain = make_step(toy_model("dn_detr"), make_batch(1), tmp_path)
    scaled = make_step(toy_model("dn_detr"), make_batch(1), tmp_path, torch.float16)
    scaled.load_state_dict(plain.state_dict())
    assert scaled.scaler.is_enabled()


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    class Kink(torch.nn.Module):
        """The loss is 0, its gradient 0 * inf."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, batch):
            return {"main/l1": self.weight.sqrt().sum() * 0}

    model = Kink()
    step = make_step(model, make_batch(1), tmp_path)
    with (
        EventStorage(),
        pytest.raises(FloatingPointError, match=naming("gradient of weight", "gradient_norm", "nan", "image_0.png")),
    ):
        step.run_step()
    assert model.weight.item() == 0


def test_evaluation_of_lean_annotation_files(tmp_path):
    """No area, no iscrowd, ids from 0: perfect predictions still have AP 100."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.structures import Boxes, Instances
    from PIL import Image

    from dn_detr_d2.data import register_coco_json

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    boxes = [[2, 2, 20, 20], [10, 12, 8, 9]]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 32, "width": 32}],
        "categories": [{"id": 5, "name": "x"}],
        "annotations": [{"id": i, "image_id": 1, "category_id": 5, "bbox": box} for i, box in enumerate(boxes)],
    }
    (tmp_path / "set.json").write_text(json.dumps(content))
    register_coco_json("test_lean", str(tmp_path / "set.json"), str(tmp_path))
    try:
        evaluator = TolerantCOCOEvaluator("test_lean", tasks=("bbox",), output_dir=None)
        evaluator.reset()
        corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes]).float()
        found = Instances((32, 32), pred_boxes=Boxes(corners), scores=torch.ones(2), pred_classes=torch.zeros(2).long())
        evaluator.process([{"image_id": 1}], [{"instances": found}])
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    finally:
        DatasetCatalog.remove("test_lean")
        MetadataCatalog.remove("test_lean")


@pytest.mark.parametrize(
    ("overrides", "processes", "gpus", "named"),
    [
        ((), 0, 0, ["--num-gpus", 1, 0]),
        (("MODEL.DEVICE", "cuda"), 3, 2, ["--num-gpus 3", 2]),
        (("MODEL.DEVICE", "cpu"), 2, 1, ["--num-gpus 2", "CUDA_VISIBLE_DEVICES"]),
        (("MODEL.DEVICE", "cpu"), 2, 0, ["2 CPU processes", "MODEL.DEVICE cpu"]),
        (("SOLVER.IMS_PER_BATCH", 3), 1, 0, None),
    ],
)
def test_processes_that_cannot_be_started_are_refused(toy_cfg, monkeypatch, overrides, processes, gpus, named):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    cfg = toy_cfg("dn_detr", *overrides)
    if named is None:
        check_processes(cfg, processes, 1)
        return
    with pytest.raises(ConfigError, match=naming(*named)):
        check_processes(cfg, processes, 1)


def test_an_uneven_batch_is_refused(toy_cfg, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match=naming("IMS_PER_BATCH", 3, 2)):
        check_processes(toy_cfg("dn_detr", "SOLVER.IMS_PER_BATCH", 3), 2, cpu_wanted=True)


COUNTS = [(3, 1, 0, 0), (2, 0, 1, 4)]  # four images; the first case leaves the second of two processes without objects


def gradients_of_this_rank(cfg, folder, plant=None):
    """Gradients of this process' share of four images in float64 for each case; rank 0 saves them.

    ``plant`` breaks something first, in every process.
    """
    from detectron2.engine import create_ddp_model
    from detectron2.modeling import build_model
    from detectron2.utils import comm

    torch.set_num_threads(1)
    results = []
    with in_float64(), pytest.MonkeyPatch.context() as patch:
        if plant is not None:
            plant(patch)
        torch.manual_seed(0)
        model = create_ddp_model(build_model(cfg).double(), device_ids=None, broadcast_buffers=False).train()
        for counts in COUNTS:
            share = len(counts) // comm.get_world_size()
            mine = slice(comm.get_rank() * share, (comm.get_rank() + 1) * share)
            model.zero_grad()
            sum(model(make_batch(*counts, sizes=((64, 64),))[mine]).values()).backward()
            results.append({n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.requires_grad})
    if comm.is_main_process():
        torch.save(results, f"{folder}/{comm.get_world_size()}.pth")


def differences_of_two_processes(toy_cfg, folder, plant=None):
    """For each case the largest difference of any gradient between one and two processes, as a part of the largest."""
    cfg = toy_cfg("dn_deformable_detr", *QUIET, *HIDDEN)
    gradients_of_this_rank(cfg, str(folder), plant)
    on_ranks(gradients_of_this_rank, cfg, str(folder), plant)
    one, two = (torch.load(folder / f"{n}.pth", weights_only=True) for n in (1, 2))
    worst = []
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert all(x.dtype == torch.float64 for x in a.values())
        largest = max(x.abs().max().item() for x in a.values())
        worst.append(max((a[name] - b[name]).abs().max().item() for name in a) / largest)
    return worst


# How far the gradients of one and of two processes may be apart, as a part of the largest, in float64. A convolution may sum
# in another order for two images than for four, which moves its output by some epsilons. The coarsest level of the toy is a
# single cell, so that its group norm normalises two numbers: their standard deviation s is as small as the norm's own
# epsilon of 1e-5 permits (1 / s was 150), and what moves the input by d moves the gradient by d / s^2 <= d / 1e-5.
ROUNDING = torch.finfo(torch.float64).eps / 1e-5


def test_two_gloo_processes_equal_one(toy_cfg, tmp_path):
    """Also with unequal counts and a process without objects.

    Padding is hidden: left visible, as in the official code, a denoising query sees how many objects the fullest image of
    *its* process has, so the result depends on how images are dealt out. In float64: in float32 the same bound would be
    1e-2, and the difference is 3e-7 or 4e-5 depending on the instruction set.
    """
    worst = differences_of_two_processes(toy_cfg, tmp_path)
    assert max(worst) <= ROUNDING, worst


def normalise_locally(patch):
    """Each process divides by its own number of objects instead of the mean over all."""
    own = lambda counts, device: torch.tensor(counts, dtype=torch.float64, device=device).clamp(min=1)  # noqa: E731
    patch.setattr("dn_detr_d2.losses.normalizers.mean_over_ranks", own)


def do_not_reduce(patch):
    """Gradients stay those of a process' own images."""
    patch.setattr("detectron2.engine.defaults.DistributedDataParallel", lambda model, **_: model)


@pytest.mark.parametrize("plant", [normalise_locally, do_not_reduce])
def test_a_fault_between_two_processes_is_larger_than_rounding(toy_cfg, tmp_path, plant):
    worst = differences_of_two_processes(toy_cfg, tmp_path, plant)
    assert min(worst) > 1e6 * ROUNDING, worst


# In the toys' narrow backbone more weights have a gradient of nearly zero.
RESNET_18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]


def twenty_steps(cfgs, folder):
    """Trains in float64 with AdamW on this process' share of four images; rank 0 saves the weights."""
    from detectron2.engine import create_ddp_model
    from detectron2.modeling import build_model
    from detectron2.utils import comm

    from dn_detr_d2.engine.optimizer import build_optimizer

    torch.set_num_threads(1)
    with in_float64():
        for name, cfg in cfgs.items():
            torch.manual_seed(0)
            model = build_model(cfg).double()
            optimizer = build_optimizer(cfg, model)
            model = create_ddp_model(model, device_ids=None, broadcast_buffers=False).train()
            share = 4 // comm.get_world_size()
            mine = slice(comm.get_rank() * share, (comm.get_rank() + 1) * share)
            for step in range(20):
                batch = make_batch(*COUNTS[step % 2], sizes=((64, 64),), seed=step)[mine]
                optimizer.zero_grad()
                sum(model(batch).values()).backward()
                optimizer.step()
            if comm.is_main_process():
                weights = {n.removeprefix("module."): p.detach() for n, p in model.named_parameters()}
                torch.save(weights, f"{folder}/{name}_{comm.get_world_size()}.pth")


@pytest.mark.parametrize(
    ("system", "bound"), [("dn_detr", 1e-10), pytest.param("dn_deformable_detr", 1e-9, marks=pytest.mark.long)]
)
def test_after_twenty_steps_of_adamw_two_processes_have_the_weights_of_one(toy_cfg, tmp_path, system, bound):
    """In float64: AdamW divides by the root of a mean square, which blows up float32's rounding to whole steps.

    The deformable toy has weights whose gradient is nearly zero, where even float64's rounding shows in the tenth digit.
    """
    cfgs = {system: toy_cfg(system, *QUIET, *HIDDEN, *RESNET_18)}
    twenty_steps(cfgs, str(tmp_path))
    on_ranks(twenty_steps, cfgs, str(tmp_path))
    one, two = (torch.load(tmp_path / f"{system}_{n}.pth", weights_only=True) for n in (1, 2))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < bound


@pytest.mark.parametrize("averaged", [False, True], ids=["nothing", "a buffer"])
def test_a_model_without_parameters_is_evaluated(toy_cfg, averaged):
    """It stands on its buffers' device, or on the CPU."""
    module = torch.nn.Module()
    if averaged:
        module.register_buffer("mean", torch.zeros(1))
    assert Trainer.test(toy_cfg("dn_detr"), module) == {}


def three_steps(cfg, folder):
    """In a process of its own: the weights after three steps, as this rank has them."""
    from detectron2.engine import create_ddp_model
    from detectron2.modeling import build_model
    from detectron2.utils import comm

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = create_ddp_model(build_model(cfg).train(), broadcast_buffers=False, device_ids=None)
    optimizer = Trainer.build_optimizer(cfg, model)
    for step in range(3):
        optimizer.zero_grad()
        sum(model(make_batch(2, seed=2 * step + comm.get_rank())).values()).backward()
        optimizer.step()
    torch.save(model.module.state_dict(), f"{folder}/{comm.get_rank()}.pth")


def test_one_decoder_layer_trains_in_two_processes(toy_cfg, tmp_path):
    cfg = toy_cfg("dn_detr", "MODEL.DN_DETR.DECODER.NUM_LAYERS", 1)
    on_ranks(three_steps, cfg, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
