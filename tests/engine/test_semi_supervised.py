"""Semi-supervised training: pseudo labels, what they enter, and everything that holds for other trainings."""

import functools
import json
import shutil

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from naming import naming
from ranks import on_ranks
from toy_training import differing, load, make_cfg, stop_at, train

from dn_detr_d2 import ConfigError
from dn_detr_d2.data.registered import records_of
from dn_detr_d2.engine import Trainer
from dn_detr_d2.engine import trainer as trainer_module
from dn_detr_d2.engine.pseudo_labels import PseudoLabels, _warn_of_limit, class_thresholds
from dn_detr_d2.engine.semi_supervised import SemiSupervisedStep
from dn_detr_d2.engine.trainer import scaled_to_workers
from dn_detr_d2.losses import LossNormalizers, StepNormalizers

# An untrained detector gives every class a score near 0.01, so this makes every query a pseudo label.
SEMI = [
    *("SEMI_SUPERVISED.ENABLED", True, "SEMI_SUPERVISED.BURN_IN", 2, "SEMI_SUPERVISED.THRESHOLD", 0.002),
    *("SEMI_SUPERVISED.NMS", 1.0, "MODEL_EMA.ENABLED", True, "MODEL_EMA.DECAY", 0.5),
    *("DATASETS.UNLABELED", ("shapes_val",)),
]


def detections(boxes, scores, classes):
    return Instances(
        (100, 100),
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes),
    )


def test_pseudo_labels_of_a_worked_example():
    """The second box is below its class's threshold, the third overlaps the first by 0.81, the fourth has no width."""
    found = detections(
        [[0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 9, 9], [5, 5, 5, 9], [20, 20, 40, 40]],
        [0.9, 0.6, 0.5, 0.95, 0.5],
        [0, 1, 1, 0, 0],
    )
    labels = PseudoLabels([0.4, 0.7], nms_iou=0.8, noise_growth=2.0)(found)
    assert labels.gt_boxes.tensor.tolist() == [[0, 0, 10, 10], [20, 20, 40, 40]]
    assert labels.gt_classes.tolist() == [0, 0]
    torch.testing.assert_close(labels.gt_weights, torch.tensor([0.9, 0.5]))
    torch.testing.assert_close(labels.gt_noise_factors, torch.tensor([1.2, 2.0]))
    assert labels.image_size == (100, 100)
    plain = PseudoLabels([0.4, 0.4], nms_iou=1.0, weighted=False, noise_growth=0.0)(found)
    assert len(plain) == 4
    assert not plain.has("gt_weights")
    assert not plain.has("gt_noise_factors")


@pytest.mark.parametrize(("most", "scores", "warned"), [
    (2, [0.9, 0.8], True), (2, [0.9, 0.3], False), (3, [0.9, 0.8], False), (None, [0.9, 0.8], False),
])  # fmt: skip
def test_as_many_pseudo_labels_as_there_may_be_detections_are_warned_of_once(most, scores, warned, caplog):
    """An image may have more objects then, which would be trained as background."""
    _warn_of_limit.cache_clear()
    found = detections([[0, 0, 10, 10], [50, 50, 60, 60]], scores, [0, 1])
    labels = PseudoLabels([0.4, 0.4], most=most)
    with caplog.at_level("WARNING", "dn_detr_d2"):
        labels(found)
        labels(found)
    assert caplog.text.count("all 2 detections") == warned


def test_no_detection_is_no_pseudo_label():
    make = PseudoLabels([0.5])
    for labels in (make(detections([[0, 0, 1, 1]], [0.1], [0])), make.none((100, 100))):
        assert len(labels) == 0
        assert labels.gt_boxes.tensor.shape == (0, 4)
        assert labels.gt_classes.dtype == torch.int64
        assert labels.get_fields().keys() == make(detections([[0, 0, 9, 9]], [0.9], [0])).get_fields().keys()


def test_thresholds_of_single_classes(tmp_path):
    cfg = make_cfg(tmp_path, *SEMI, "SEMI_SUPERVISED.CLASS_THRESHOLDS", [["triangle", 0.9]])
    names = list(cfg.MODEL.DN_DETR.CLASS_NAMES)
    assert class_thresholds(cfg) == [0.9 if name == "triangle" else 0.002 for name in names]


@pytest.mark.parametrize(("overrides", "named"), [
    (["MODEL_EMA.ENABLED", False], ["MODEL_EMA.ENABLED"]),
    (["DATASETS.UNLABELED", ()], ["DATASETS.UNLABELED"]),
    (["MODEL.DN_DETR.DENOISING.NAME", ""], ["SEMI_SUPERVISED.LOSSES", "denoising", "matching"]),
    (["SEMI_SUPERVISED.LOSSES", ["boxes"]], ["boxes", "matching"]),
    (["SEMI_SUPERVISED.BURN_IN", 6], ["BURN_IN", 6, "MAX_ITER"]),
    (["MODEL.DN_DETR.DENOISING.KNOWN_FRACTION", 0.5], ["KNOWN_FRACTION", "LABEL_PROMPTS"]),
    (["MODEL.DN_DETR.DENOISING.LABEL_PROMPTS", True], ["KNOWN_FRACTION", "LABEL_PROMPTS"]),
    (["SEMI_SUPERVISED.LOSSES", []], ["SEMI_SUPERVISED.LOSSES", "matching"]),
    (["SEMI_SUPERVISED.UNLABELED_RATIO", 0], ["UNLABELED_RATIO", 0]),
    (["SEMI_SUPERVISED.THRESHOLD", 1.5], ["THRESHOLD", 1.5]),
    (["SEMI_SUPERVISED.NOISE_GROWTH", -1.0], ["NOISE_GROWTH", -1.0]),
    (["SEMI_SUPERVISED.CLASS_THRESHOLDS", [["hexagon", 0.5]]], ["hexagon", "triangle"]),
    (["SEMI_SUPERVISED.CLASS_THRESHOLDS", [["triangle", 2]]], ["triangle", 2]),
    (["SEMI_SUPERVISED.CLASS_THRESHOLDS", ["triangle"]], ["CLASS_THRESHOLDS", "triangle"]),
    (["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"], ["RepeatFactorTrainingSampler", "TrainingSampler"]),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_it_starts(overrides, named, tmp_path):
    with pytest.raises(ConfigError, match=naming(*named)):
        make_cfg(tmp_path, *SEMI, *overrides)


def test_matching_alone_may_learn_in_a_model_without_denoising(tmp_path):
    options = ["MODEL.DN_DETR.DENOISING.NAME", "", "SEMI_SUPERVISED.LOSSES", ["matching"]]
    make_cfg(tmp_path, *SEMI, *options)


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {name: value for line in lines for name, value in line.items()}


@pytest.mark.parametrize("used", [["matching", "denoising"], ["matching"], ["denoising"]])
def test_pseudo_labels_enter_what_they_shall(tmp_path, used):
    train(make_cfg(tmp_path / "out", *SEMI, "SEMI_SUPERVISED.LOSSES", used))
    found = {name: x for name, x in losses_of(tmp_path / "out").items() if name.startswith("unlabeled/")}
    denoised = {name: x for name, x in found.items() if name.startswith("unlabeled/dn/")}
    matched = {name: x for name, x in found.items() if name not in denoised}
    assert len(denoised) == len(matched) == 6
    assert all((x > 0) == ("denoising" in used) for x in denoised.values())
    assert all((x > 0) == ("matching" in used) for x in matched.values())


def test_until_the_burn_in_is_over_nothing_differs(tmp_path):
    """Three of six iterations, and then one more."""
    train(make_cfg(tmp_path / "semi", *SEMI, "SEMI_SUPERVISED.BURN_IN", 3, "SOLVER.CHECKPOINT_PERIOD", 1))
    train(
        make_cfg(tmp_path / "plain", "MODEL_EMA.ENABLED", True, "MODEL_EMA.DECAY", 0.5, "SOLVER.CHECKPOINT_PERIOD", 1)
    )
    same = []
    for i in (2, 3):
        first, second = (load(tmp_path / name, f"model_{i:07d}")["model"] for name in ("semi", "plain"))
        same.append(differing({"model": first}, {"model": second}) == [])
    assert same == [True, False]


def test_without_pseudo_labels_an_image_only_teaches_what_is_no_object(tmp_path):
    train(make_cfg(tmp_path / "out", *SEMI, "SEMI_SUPERVISED.THRESHOLD", 1.0))
    found = losses_of(tmp_path / "out")
    assert found["pseudo_labels/an_image"] == 0
    assert found["unlabeled/main/class"] > 0
    assert found["unlabeled/main/l1"] == found["unlabeled/dn/l1"] == found["unlabeled/dn/class"] == 0


def test_annotations_of_unlabeled_images_teach_nothing(tmp_path):
    """The same images as a folder, where there are none: equal to the bit."""
    (tmp_path / "pictures").mkdir()
    for record in records_of("shapes_val"):
        shutil.copy(record["file_name"], tmp_path / "pictures")
    train(make_cfg(tmp_path / "set", *SEMI))
    train(make_cfg(tmp_path / "folder", *SEMI, "DATASETS.UNLABELED", (str(tmp_path / "pictures"),)))
    first, second = load(tmp_path / "set"), load(tmp_path / "folder")
    assert differing({"model": first["model"]}, {"model": second["model"]}) == []


@pytest.mark.parametrize("options", [
    pytest.param([], id="burn-in before the checkpoint"),
    pytest.param(["SEMI_SUPERVISED.BURN_IN", 4], id="burn-in after the checkpoint"),
    pytest.param(["DATALOADER.NUM_WORKERS", 2, "SEMI_SUPERVISED.UNLABELED_RATIO", 2], id="two loader workers"),
    pytest.param(["SOLVER.ACCUMULATION_STEPS", 2], id="accumulation"),
])  # fmt: skip
def test_a_resumed_training_equals_one_that_was_not_stopped(tmp_path, options):
    train(make_cfg(tmp_path / "whole", *SEMI, *options))
    stop_at(tmp_path / "whole", "model_0000002", tmp_path / "stopped")
    resumed = train(make_cfg(tmp_path / "stopped", *SEMI, *options), resume=True, seed=99)
    assert resumed.start_iter == 3
    assert differing(load(tmp_path / "whole"), load(tmp_path / "stopped")) == []


def test_the_teacher_has_the_nms_of_pseudo_labels_alone(tmp_path):
    """TEST.NMS would come before SEMI_SUPERVISED.NMS, which is 1 here, and leave less to label."""
    for nms in (1.0, 0.0):
        train(make_cfg(tmp_path / str(nms), *SEMI, "TEST.NMS", nms))
    assert differing({"model": load(tmp_path / "1.0")["model"]}, {"model": load(tmp_path / "0.0")["model"]}) == []


def test_two_processes_resume_and_share_the_pseudo_labelled_images(tmp_path):
    on_ranks(train, make_cfg(tmp_path / "whole", *SEMI))
    stop_at(tmp_path / "whole", "model_0000002", tmp_path / "stopped")
    on_ranks(train, make_cfg(tmp_path / "stopped", *SEMI), True, 99)
    whole = load(tmp_path / "whole")
    assert len(whole["random_states"]) == 2
    assert differing(whole, load(tmp_path / "stopped")) == []
    assert losses_of(tmp_path / "whole")["unlabeled/dn/l1"] > 0


def test_pseudo_labels_change_what_is_learned(tmp_path):
    """Or the tests above would compare trainings that leave them out."""
    train(make_cfg(tmp_path / "semi", *SEMI))
    train(
        make_cfg(tmp_path / "plain", *SEMI, "SEMI_SUPERVISED.LOSS_WEIGHT", 0.0, "SEMI_SUPERVISED.DENOISING_WEIGHT", 0.0)
    )
    assert differing({"model": load(tmp_path / "semi")["model"]}, {"model": load(tmp_path / "plain")["model"]})


def late(cfg, *, delayed):
    """A training whose steps are read late, as on a GPU, or at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "SemiSupervisedStep", functools.partial(SemiSupervisedStep, delayed=delayed))
        train(cfg)


def test_the_teacher_is_the_same_whenever_the_host_reads_a_step(tmp_path):
    """Checkpoints make the host read too; neither when they are written nor when steps are read may matter."""
    once = ["SOLVER.CHECKPOINT_PERIOD", 100]
    late(make_cfg(tmp_path / "late", *SEMI, *once), delayed=True)
    late(make_cfg(tmp_path / "often", *SEMI, "SOLVER.CHECKPOINT_PERIOD", 1), delayed=True)
    late(make_cfg(tmp_path / "at_once", *SEMI, *once), delayed=False)
    late_, often, at_once = ({"model": load(tmp_path / x)["model"]} for x in ("late", "often", "at_once"))
    assert differing(late_, at_once) == []
    assert differing(often, at_once) == []


def test_without_burn_in_the_teacher_is_what_was_loaded(tmp_path):
    train(make_cfg(tmp_path / "first", "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", ()))
    weights = ["MODEL.WEIGHTS", str(tmp_path / "first" / "model_final.pth"), "SEMI_SUPERVISED.BURN_IN", 0]
    trainer = Trainer(make_cfg(tmp_path / "second", *SEMI, *weights))
    trainer.resume_or_load(resume=False)
    loaded, taught = load(tmp_path / "first")["model"], trainer._trainer.teacher.state_dict()
    assert all(torch.equal(taught[name], x) for name, x in loaded.items())


@pytest.mark.parametrize(
    ("decay", "warmup", "warned"), [(0.5, False, False), (0.9997, False, True), (0.9997, True, False)]
)
def test_a_teacher_that_would_hardly_change_is_warned_of(decay, warmup, warned, tmp_path, caplog):
    with caplog.at_level("WARNING", "dn_detr_d2"):
        average = ["MODEL_EMA.DECAY", decay, "MODEL_EMA.WARMUP", warmup]
        make_cfg(tmp_path, *SEMI, "SOLVER.MAX_ITER", 100, *average)
    assert bool(naming("MODEL_EMA.DECAY", "SEMI_SUPERVISED.BURN_IN").search(caplog.text)) == warned


def test_steps_without_a_pseudo_label_are_warned_of_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(SemiSupervisedStep, "EMPTY", 2)
    with caplog.at_level("WARNING", "dn_detr_d2"):
        train(make_cfg(tmp_path / "out", *SEMI, "SEMI_SUPERVISED.THRESHOLD", 1.0))
    assert caplog.text.count("SEMI_SUPERVISED.THRESHOLD") == 1


def test_few_pseudo_labels_are_divided_by_the_annotated_objects():
    def made(matching, denoising):
        return StepNormalizers(
            LossNormalizers(torch.tensor(matching), [3]), LossNormalizers(torch.tensor(denoising), [4])
        )

    found = made(1.0, 90.0).at_least(made(7.0, 35.0))
    assert found.matching.num_pairs.item() == 7
    assert found.denoising.num_pairs.item() == 630  # one object has as many copies as seven: of a budget of queries
    same = made(14.0, 90.0).at_least(made(7.0, 35.0))
    assert (same.matching.num_pairs.item(), same.denoising.num_pairs.item()) == (14, 90)
    assert (found.matching.step_counts, found.denoising.step_counts) == ([3], [4])


def test_iterations_are_scaled_with_the_number_of_workers(tmp_path):
    cfg = make_cfg(
        tmp_path, *SEMI, "SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.MAX_ITER", 60, "SEMI_SUPERVISED.BURN_IN", 20
    )
    assert scaled_to_workers(cfg, 2).SOLVER.MAX_ITER == 30
    cfg.defrost()
    cfg.TEST.INSTABILITY.PERIOD = 4
    assert scaled_to_workers(cfg, 2).SEMI_SUPERVISED.BURN_IN == 10
    assert scaled_to_workers(cfg, 2).TEST.INSTABILITY.PERIOD == 2  # as many images between two probes
    assert scaled_to_workers(cfg, 1).SEMI_SUPERVISED.BURN_IN == 20


class FailingTeacher(torch.nn.Module):
    """Fails at its second call on one rank."""

    def __init__(self, teacher, rank):
        super().__init__()
        self.teacher, self.rank, self.calls = [teacher], rank, 0

    def without_nms(self):
        return self.teacher[0].without_nms()

    def forward(self, views):
        self.calls += 1
        if self.calls == 2 and comm.get_rank() == self.rank:
            raise FloatingPointError(f"not finite in {views[0]['file_name']}")
        return self.teacher[0](views)


def train_with_failing_teacher(cfg, rank):
    made = trainer_module.semi_supervised_options

    def options(cfg, teacher):
        return made(cfg, teacher) | {"teacher": FailingTeacher(teacher, rank)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "semi_supervised_options", options)
        return train(cfg)._trainer.skipped


def test_a_teacher_that_fails_costs_a_step_and_is_named(tmp_path):
    cfg = make_cfg(tmp_path / "out", *SEMI)
    with pytest.raises(FloatingPointError, match=naming("SEMI_SUPERVISED", "shapes_val")):
        train_with_failing_teacher(cfg, 0)
    report = json.loads((tmp_path / "out" / "nan_report" / "iteration_3_rank_0.json").read_text())
    assert report["images"]
    assert all("shapes_val" in name for name in report["images"])  # not the annotated ones of the step
    assert "not when repeated" not in report["fault"]


def skips(cfg):
    assert train_with_failing_teacher(cfg, 1) == 1


def test_a_teacher_that_fails_on_one_rank_leaves_none_waiting(tmp_path):
    on_ranks(skips, make_cfg(tmp_path / "out", *SEMI, "SOLVER.NONFINITE", "skip", "SOLVER.NONFINITE_LIMIT", 3))
    assert load(tmp_path / "out")["iteration"] == 5


def test_a_loss_that_is_not_finite_is_discarded_and_named(tmp_path, monkeypatch):
    made = SemiSupervisedStep.__init__

    def poisoned(self, *arguments, **options):
        made(self, *arguments, **options)
        self.weights = {"matching": float("nan"), "denoising": 1.0}

    monkeypatch.setattr(SemiSupervisedStep, "__init__", poisoned)
    cfg = make_cfg(tmp_path / "out", *SEMI, "SOLVER.CHECKPOINT_PERIOD", 1)
    with pytest.raises(FloatingPointError, match=naming("unlabeled/main")):
        train(cfg)
    assert json.loads((tmp_path / "out" / "nan_report" / "iteration_2_rank_0.json").read_text())["iteration"] == 2
    assert load(tmp_path / "out", "model_0000001")["iteration"] == 1
    batch = torch.load(tmp_path / "out" / "nan_report" / "iteration_2_rank_0.pth", weights_only=True)["batch"]
    assert len(batch) == 4
    assert all("instances" in record for record in batch)  # pseudo labels too: the teacher moves on
