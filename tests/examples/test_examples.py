"""Denoising in detectors of other people: the models of examples/, with denoising and without."""

import ast
import importlib
import re
import subprocess
import sys

import pytest
import shapes_training
import torch
from conftest import ROOT, off_the_start
from ranks import run_program

from dn_detr_d2 import LeakError
from dn_detr_d2.denoising import NoisedTargets

NAMES = ["torchvision_detr", "dab_detr_transformers"]


@pytest.fixture(params=NAMES)
def example(request):
    if request.param == "dab_detr_transformers":
        pytest.importorskip("transformers", reason="pip install transformers, or this package with [examples]")
    return importlib.import_module(request.param)


def make(example, denoising, seed=0):
    torch.manual_seed(seed)
    return example.make(denoising)


def batch(*counts):
    targets = [{"labels": torch.randint(3, (n,)), "boxes": torch.rand(n, 4) * 0.3 + 0.3} for n in counts]
    return torch.randn(len(counts), 3, 64, 64), targets


def test_without_targets_it_is_the_model_without_denoising_to_the_bit(example):
    plain, denoising = make(example, False), make(example, True)
    before = plain.state_dict()
    assert all(value.equal(before[name]) for name, value in denoising.state_dict().items() if name in before)
    keys = denoising.load_state_dict(off_the_start(plain).state_dict(), strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys
    assert all(name.startswith("denoising.") for name in keys.missing_keys)
    images, targets = batch(2, 1)
    with torch.no_grad():
        for a, b in zip(*(example.predict(model.eval(), images) for model in (plain, denoising)), strict=True):
            assert a.equal(b)
        a, b = (example.losses(model, images, targets) for model in (plain, denoising))
    assert a == b


def test_matching_losses_are_those_of_the_model_without_denoising(example):
    plain, denoising = off_the_start(make(example, False)), make(example, True)
    denoising.load_state_dict(plain.state_dict(), strict=False)
    images, targets = batch(3, 2)
    a, b = (example.losses(model.train(), images, targets) for model in (plain, denoising))
    assert {"dn/class", "dn/l1", "dn/giou", "dn/l1_0", "dn/l1_1"} <= b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
def test_every_parameter_has_a_gradient(example, counts):
    model = off_the_start(make(example, True)).train()
    values = example.losses(model, *batch(*counts))
    sum(values.values()).backward()
    assert all(value.isfinite() for value in values.values())
    assert [name for name, x in model.named_parameters() if x.grad is None] == []


def test_no_query_sees_a_denoising_query_of_another_group(example):
    assert (
        example.check(off_the_start(make(example, True)), *batch(3, 2)) >= 15
    )  # 5 groups: 5 sets or more, 3 strengths


def test_a_decoder_without_the_mask_is_found(example):
    model = off_the_start(make(example, True))
    model.denoising.attention_mask = False
    with pytest.raises(LeakError, match="30 of 30 matching"):
        example.check(model, *batch(3, 2))


def test_groups_that_see_each_other_are_found(example, monkeypatch):
    given = NoisedTargets.attention_mask

    def one_group(self, num_matching):
        blocked = given(self, num_matching).clone()
        blocked[..., : self.num_queries, : self.num_queries] = False
        return blocked

    monkeypatch.setattr(NoisedTargets, "attention_mask", one_group)
    with pytest.raises(LeakError, match="denoising queries of other groups"):
        example.check(off_the_start(make(example, True)), *batch(3, 2))


@pytest.mark.parametrize("denoising", [True, False])
def test_a_step_lowers_the_loss(example, denoising):
    model, (images, targets) = make(example, denoising).train(), batch(3, 1, 0, 2)
    optimizer, seen = torch.optim.SGD(model.parameters(), 1e-4), []
    for _ in range(2):
        torch.manual_seed(1)  # the same noise
        seen.append(sum(example.losses(model, images, targets).values()))
        optimizer.zero_grad()
        seen[-1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert seen[1] < seen[0]


ADDED = re.compile(r"denoising|dn_detr_d2|isolation|\bdn\b", re.IGNORECASE)


def lines_for_denoising(text):
    """Lines of classes whose names begin with Denoising, and others with a word of denoising; empty lines do not count."""
    inside = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Denoising"):
            inside |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for i, line in lines if line.strip() and (i in inside or ADDED.search(line)))


@pytest.mark.parametrize("name", NAMES)
def test_denoising_is_less_than_80_lines(name):
    assert 20 < lines_for_denoising((ROOT / "examples" / f"{name}.py").read_text()) < 80


def test_lines_are_counted():
    text = "import a\nfrom dn_detr_d2 import b\n\n\nclass A:\n    x = 1\n\n\nclass DenoisingA(A):\n    y = 1\n\n    z = 2\n"
    assert lines_for_denoising(text) == 4
    assert lines_for_denoising(text + "    w = 3\n" * 80) == 84
    assert lines_for_denoising("dn = f(x)\nsplit(dnx)\n") == 1


def test_mirrored_boxes_lie_on_mirrored_objects():
    images, corners = torch.zeros(3, 3, 64, 64), [(4, 8, 20, 40), (30, 2, 60, 12), (10, 50, 14, 63)]
    targets = []
    for image, (x0, y0, x1, y1) in zip(images, corners, strict=True):
        image[:, y0:y1, x0:x1] = 1
        box = torch.tensor([[(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]]) / 64
        targets.append({"labels": torch.tensor([1]), "boxes": box})
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(20):
        drawn, found = shapes_training.draw_batch((images, targets, None), 2, generator)
        for image, target in zip(drawn, found, strict=True):
            cx, cy, w, h = (64 * target["boxes"][0]).tolist()
            x0, y0, x1, y1 = (round(v) for v in (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
            assert image[:, y0:y1, x0:x1].eq(1).all()
            assert image.sum() == 3 * (x1 - x0) * (y1 - y0)
            seen.add((x0, y0))
    assert len(seen) == 12  # three objects, mirrored along none, one or both axes


def test_detections_that_are_the_objects_have_ap_100():
    data = shapes_training.load("shapes_val")
    answers = iter(data[1])

    def predict(images):
        scores, boxes = torch.zeros(len(images), 4, 3), torch.full((len(images), 4, 4), 0.5)
        for i, target in zip(range(len(images)), answers, strict=False):
            rows = torch.arange(len(target["labels"]))
            scores[i, rows, target["labels"]], boxes[i, rows] = 1.0, target["boxes"]
        return scores, boxes

    assert shapes_training.average_precision(torch.nn.Identity(), predict, data) == pytest.approx((100, 100))


@pytest.mark.parametrize(
    "options", [[], pytest.param(["--no-denoising"], marks=pytest.mark.long)], ids=["with", "without"]
)
def test_the_command_trains_and_prints_ap(example, options):
    done = run_program(f"examples/{example.__name__}.py", "--iterations", 1, "--seed", 3, *options)
    assert done.returncode == 0, done.stderr
    assert re.match(r'\{"iteration": 1, "AP": [\d.]+, "AP50": ', done.stdout)
    assert ("dn/class" in done.stdout) is not bool(options)


USE = """
import sys
sys.path[:0] = ["examples", "."]
sys.modules.update(detectron2=None, fvcore=None, pycocotools=None)
import torch
import {name} as example
targets = [{{"labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}}]
print(*example.losses(example.make(True), torch.randn(1, 3, 64, 64), targets))
"""


def test_the_models_need_no_detectron2(example):
    """Only the data set of the commands does."""
    line = [sys.executable, "-c", USE.format(name=example.__name__)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "dn/class" in done.stdout.split(), done.stderr
