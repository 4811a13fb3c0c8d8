"""dev/compare_runs.py: pairs differ in denoising alone, trainings side by side do not touch each other."""

import json
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, valid_coco
from detectron2.data import DatasetCatalog, MetadataCatalog
from naming import naming
from PIL import Image
from toy_training import rates_of

from dev.compare.keep import keep
from dev.compare.report import check_claims, iterations_until, require_complete, table_rows
from dev.compare.train import InterleavedRun, advance_in_turn, configure, folders_of, train_interleaved
from dev.compare.variants import (
    ABLATIONS,
    DENOISED,
    FOLDER,
    HALF,
    HOSTS,
    LONG_PAIRS,
    MATCHING,
    NOISES,
    PAIRS,
    Variant,
    variants_of,
)
from dev.compare_runs import main, parse_arguments, take_backbone
from dn_detr_d2 import UserError
from dn_detr_d2.visualization.runs import Group, read_run
from dn_detr_d2.visualization.style import colour, line_style

OVERRIDES = {
    "MODEL.DEVICE": "cpu",
    "MODEL.DN_DETR.NUM_CLASSES": 3,
    "DATASETS.TEST": "()",
    "SOLVER.MAX_ITER": 4,
    "INPUT.MIN_SIZE_TRAIN": (48, 64),
    "MODEL.DN_DETR.HIDDEN_DIM": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "MODEL.DN_DETR.DECODER.NUM_LAYERS": 2,
}
SMALL = list(chain(*OVERRIDES.items()))


def leaves(node, prefix=""):
    for key, value in node.items():
        yield from leaves(value, f"{prefix}{key}.") if hasattr(value, "items") else [(f"{prefix}{key}", str(value))]


@pytest.mark.parametrize("pair", [*PAIRS, *HOSTS])
def test_a_pair_differs_in_denoising_and_in_nothing_else(pair, tmp_path):
    variants = variants_of(pair)[:2]
    assert [variant.name for variant in variants] == [MATCHING, DENOISED]
    made = [configure(FOLDER / f"{pair}.yaml", variant, 1, tmp_path, SMALL) for variant in variants]
    first, second = (dict(leaves(cfg)) for cfg in made)
    differing = {key for key in first if first[key] != second[key]} - {"OUTPUT_DIR"}
    assert differing <= {"MODEL.DN_DETR.DENOISING.NAME", "MODEL.DN_DETR.QUERY_SOURCE.CONTENT"}
    assert first["MODEL.DN_DETR.DENOISING.NAME"] == ""


@pytest.mark.parametrize("variant", [*ABLATIONS, *NOISES], ids=lambda v: v.name)
def test_an_ablation_changes_what_its_name_says(variant, tmp_path):
    (tmp_path / "matrix.json").write_text("{}")
    matrix = ["MODEL.DN_DETR.DENOISING.LABEL_NOISE.CONFUSION_MATRIX", str(tmp_path / "matrix.json")]
    full, changed = (
        dict(leaves(configure(FOLDER / "deformable.yaml", v, 1, tmp_path, [*SMALL, *matrix])))
        for v in (Variant(DENOISED), variant)
    )
    differing = {key for key in full if full[key] != changed[key]} - {"OUTPUT_DIR"}
    assert differing
    assert all(key.startswith("MODEL.DN_DETR.DENOISING.") for key in differing)


def test_every_training_of_an_ablation_has_a_colour_of_its_own():
    count = len(variants_of("deformable", parse_arguments(["--ablations"]).ablations))
    assert count == 2 + len(ABLATIONS)
    assert len({colour(i) for i in range(count)}) == count


def test_other_kinds_of_noise_are_none_or_those_that_are_named_or_all():
    kinds = [variant.name for variant in NOISES]
    assert parse_arguments([]).noise == []
    assert parse_arguments(["--noise", "boxes by IoU"]).noise == ["boxes by IoU"]
    args = parse_arguments(["--noise", "--seeds", "1"])
    assert args.noise == kinds
    assert args.runs == "output/noise"
    assert [v.name for v in variants_of("deformable", args.noise)] == [MATCHING, DENOISED, *kinds]
    assert len({(colour(i), line_style(i)) for i in range(2 + len(kinds))}) == 2 + len(kinds)


def test_ablations_are_none_or_those_that_are_named_or_all():
    named = {
        tuple(line): [variant.name for variant in variants_of("deformable", parse_arguments(line).ablations)]
        for line in ([], ["--ablations", "no attention mask"], ["--ablations", "--seeds", "1"])
    }
    whole = [variant.name for variant in ABLATIONS]
    assert list(named.values()) == [
        [MATCHING, DENOISED, HALF],
        [MATCHING, DENOISED, "no attention mask"],
        [MATCHING, DENOISED, *whole],
    ]


def test_half_the_iterations_are_a_shorter_schedule(tmp_path):
    half = next(v for v in variants_of("dense") if v.name == HALF)
    cfg = configure(FOLDER / "dense.yaml", half, 1, tmp_path, [*SMALL, "SOLVER.MAX_ITER", 40])
    assert (cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD) == (20, 4)


@pytest.mark.parametrize("overrides", [
    ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.WARMUP_ITERS", 20],
    ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.WARMUP_ITERS", 20, "SOLVER.STEPS", (60, 90)],
])  # fmt: skip
def test_a_half_schedule_has_every_second_rate_of_the_whole_one(tmp_path, overrides):
    whole, half = (
        rates_of(configure(FOLDER / "dense.yaml", v, 1, tmp_path, [*SMALL, "SOLVER.MAX_ITER", 100, *overrides]))
        for v in variants_of("dense")[1:]
    )
    assert len(half) == 50
    assert half == pytest.approx(whole[::2])


def test_a_comparison_that_begins_anew_is_not_resumed_from_the_one_before(tmp_path):
    """It is cut off before its first checkpoint; what lies there of the earlier one is moved away, and nothing is lost."""
    cfg = configure(FOLDER / "dense.yaml", variants_of("dense")[1], 1, tmp_path, SMALL)
    advance_in_turn([InterleavedRun(cfg)], "first")
    first = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)["model"]
    InterleavedRun(cfg)
    assert InterleavedRun(cfg, resume=True).trainer.start_iter == 0
    kept = torch.load(Path(cfg.OUTPUT_DIR) / "earlier_1" / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(x, kept[name]) for name, x in first.items())


def record(run, seen):
    run.trainer.model.register_forward_pre_hook(
        lambda _, inputs: seen.append([(x["file_name"], x["image"].sum().item()) for x in inputs[0]])
    )


def test_all_see_the_same_images_in_the_same_order_with_the_same_augmentation(tmp_path):
    """Though denoising draws numbers of its own between them."""
    seen, running = {}, []
    for variant in variants_of("deformable")[:2]:
        run = InterleavedRun(configure(FOLDER / "deformable.yaml", variant, 7, tmp_path, SMALL))
        record(run, seen.setdefault(variant.name, []))
        running.append(run)
    for _ in range(3):
        for run in running:
            run.advance()
    assert seen[MATCHING] == seen[DENOISED]
    assert len({str(batch) for batch in seen[MATCHING]}) == 3


def test_a_training_side_by_side_is_the_training_alone(tmp_path):
    variants = variants_of("dense")[:2]
    train_interleaved(FOLDER / "dense.yaml", variants, 3, tmp_path / "both", SMALL, threads=2)
    alone = train_interleaved(FOLDER / "dense.yaml", variants[1:], 3, tmp_path / "alone", SMALL, threads=2)[0]
    first, second = (
        torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (tmp_path / "both" / alone.name, alone)
    )
    assert all(torch.equal(first[name], x) for name, x in second.items())
    assert len((alone / "step_seconds.txt").read_text().split()) == 4
    assert turns_of(alone) == {alone.name}
    assert turns_of(tmp_path / "both" / alone.name) == {
        alone.name,
        alone.name.replace("with_denoising", "matching_alone"),
    }


def turns_of(folder):
    return set((folder / "in_turn.txt").read_text().split())


def test_the_backbone_of_a_checkpoint_is_where_all_start(tmp_path):
    """Nothing else of the file is taken."""
    cfg = configure(FOLDER / "deformable.yaml", Variant(DENOISED), 4, tmp_path / "first", SMALL)
    trained = InterleavedRun(cfg).trainer.model.state_dict()
    torch.save(
        {"model": {name: x + 1 if x.is_floating_point() else x for name, x in trained.items()}}, tmp_path / "whole.pth"
    )
    opts = [*SMALL, "MODEL.WEIGHTS", str(take_backbone(str(tmp_path / "whole.pth"), tmp_path))]
    for variant in variants_of("dense")[:2]:
        state = InterleavedRun(configure(FOLDER / "dense.yaml", variant, 1, tmp_path, opts)).trainer.model.state_dict()
        for name, x in state.items():
            if name.startswith("backbone.") and x.is_floating_point():
                assert torch.equal(x, trained[name] + 1)
            elif name in trained and x.is_floating_point():
                assert not torch.equal(x, trained[name] + 1)


def make_run(folder, ap, unstable, distance, seconds, max_iter=100):
    """ap: one value each evaluation, at equal steps."""
    folder.mkdir(parents=True)
    step = max_iter // len(ap)
    lines = [
        {
            "iteration": step * (i + 1) - 1,
            "bbox/AP": x,
            "instability/layer_0": 99.0,
            "instability/layer_1": u,
            "time": 1.0,
            "anchors/distance": distance,
            "loss_main": 1.0,
        }
        for i, (x, u) in enumerate(zip(ap, unstable, strict=True))
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(f"SOLVER: {{MAX_ITER: {max_iter}}}\nSEED: 1\n")
    (folder / "step_seconds.txt").write_text("\n".join(map(str, [9.0] * 10 + seconds)))
    return read_run(folder)


@pytest.fixture
def groups(tmp_path):
    """The baseline ends at 30 on average; denoising is there at 40 % and at 60 %, with half the iterations once of twice."""
    alone = [
        make_run(tmp_path / "a1", [0, 0, 10, 20, 32], [4, 3, 2, 2, 1], 0.5, [1.0, 2, 3]),
        make_run(tmp_path / "a2", [0, 5, 10, 20, 28], [4, 4, 4, 4, 4], 0.7, [2.0]),
    ]
    denoised = [
        make_run(tmp_path / "b1", [10, 30, 31, 40, 41], [2, 2, 2, 1, 1], 0.4, [1.05, 2.1, 3.15]),
        make_run(tmp_path / "b2", [10, 20, 30, 40, 43], [2, 2, 2, 2, 2], 0.4, [2.2]),
    ]
    half = [
        make_run(tmp_path / "c1", [10, 31], [2, 2], 0.4, [1.04], 40),
        make_run(tmp_path / "c2", [10, 27], [2, 2], 0.4, [2.08], 40),
    ]
    for seed in zip(alone, denoised, half, strict=True):
        for run in seed:
            (run.folder / "in_turn.txt").write_text("".join(f"{x.folder.name}\n" for x in seed))
    return [Group(MATCHING, alone), Group(DENOISED, denoised), Group(HALF, half)]


def test_the_table_holds_what_was_worked_out_by_hand(groups):
    alone, denoised, half = table_rows(groups)
    assert alone == [
        "matching alone",
        "2",
        "30.0 (28.0 to 32.0)",
        "100%, 1 of 2 runs",
        "3.20 (2.40 to 4.00)",
        "0.600 (0.500 to 0.700)",
        "1.00 (1.00 to 1.00)",
    ]
    assert denoised[2:6] == ["42.0 (41.0 to 43.0)", "50% (40% to 60%)", "1.80 (1.60 to 2.00)", "0.400 (0.400 to 0.400)"]
    assert denoised[6] == "1.08 (1.05 to 1.10)"
    assert half[3] == "40%, 1 of 2 runs"
    assert half[6] == "1.04 (1.04 to 1.04)"  # of the steps that it took in turn with the baseline, not of those after


def test_times_of_trainings_that_did_not_take_turns_are_not_compared(groups):
    """Seed 2 of the half schedule was trained by itself, and seed 1 of the baseline was trained again without it."""
    for name in ("a1", "c2"):
        (groups[0].runs[0].folder.parent / name / "in_turn.txt").write_text("a1\nb1\n" if name == "a1" else "c2\n")
    assert [row[6] for row in table_rows(groups)] == ["1.00 (1.00 to 1.00)", "1.08 (1.05 to 1.10)", "-"]
    (groups[0].runs[0].folder / "in_turn.txt").unlink()
    assert [row[6] for row in table_rows(groups)] == ["1.00 (1.00 to 1.00)", "1.10, 1 of 2 runs", "-"]
    assert any("1.10 times as long: yes (1.10)" in line for line in check_claims(groups))
    (groups[1].runs[1].folder / "in_turn.txt").unlink()
    assert not any("1.10 times" in line for line in check_claims(groups))


def test_detectors_without_queries_have_no_matching_to_be_measured(tmp_path):
    found = [make_run(tmp_path / name, [10, ap], [0, 0], 0.5, [2.0]) for name, ap in (("a", 20), ("b", 30))]
    for run in found:
        path = run.folder / "metrics.json"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if not k.startswith(("instability", "anchors"))} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    groups = [Group(name, [read_run(run.folder)]) for name, run in zip((MATCHING, DENOISED), found, strict=True)]
    assert [row[2:6] for row in table_rows(groups)] == [["20.0", "100%", "-", "-"], ["30.0", "100%", "-", "-"]]
    assert not any("stable" in line or "anchor" in line for line in check_claims(groups))


def test_a_training_that_was_cut_off_is_not_reported(groups, tmp_path):
    """One evaluation is missing."""
    groups[1].runs[0] = make_run(tmp_path / "cut", [10, 30, 31, 40], [2, 2, 2, 1], 0.4, [2.1], 100)
    groups[1].runs[0].config["SOLVER"]["MAX_ITER"] = 125
    with pytest.raises(UserError, match=naming("cut", "--resume")):
        require_complete(groups)


def test_trainings_of_other_lengths_are_not_mixed(groups, tmp_path):
    other = make_run(tmp_path / "b3", [10, 20], [2, 2], 0.4, [2.0], 50)
    groups[1].runs[1] = other
    with pytest.raises(UserError, match=naming("b3", 50, "a1", 100)):
        require_complete(groups)


def test_the_claims_say_yes_and_no(groups):
    """The mean of denoising is 10, 25, 30.5, 40, 42 after 20, 40, ... iterations: it crosses 30 at 40 + 20 x 5 / 5.5."""
    assert check_claims(groups) == [
        "- the baseline gains less than 1 AP in its last quarter: **no** (AP +12.5)",
        "- ends higher: yes (AP 42.0 against 30.0)",
        "- half the iterations reach the baseline's final AP: **no** (the mean curve crosses it at 58%)",
        "- a schedule of half the length is enough: **no** (AP 29.0 against 30.0)",
        "- matching is more stable all along: yes (mean IS 1.80 against 3.20; lower at 5 of 5 probes)",
        "- anchors are nearer: yes (0.400 against 0.600)",
        "- an iteration takes at most 1.10 times as long: yes (1.08)",
    ]


def test_one_probe_at_which_matching_is_less_stable_is_told(groups, tmp_path):
    groups[1].runs[1] = make_run(tmp_path / "b4", [10, 20, 30, 40, 43], [9, 2, 2, 2, 2], 0.4, [2.0])
    claim = check_claims(groups)[4]
    assert claim.startswith(
        "- matching is more stable all along: **no** (mean IS 2.50 against 3.20; lower at 4 of 5 probes)"
    )


def test_a_baseline_that_does_not_detect_proves_nothing(tmp_path):
    alone = Group(MATCHING, [make_run(tmp_path / "a", [0, 0], [2, 2], 0.5, [1.0])])
    denoised = Group(DENOISED, [make_run(tmp_path / "b", [0, 0.4], [1, 1], 0.4, [1.0])])
    assert table_rows([alone, denoised])[1][3] == "-"
    claims = check_claims([alone, denoised])
    assert claims[0] == "- the baseline does not detect yet (AP 0.0; with denoising 0.4): AP says nothing here"
    assert not any("half" in line or "ends higher" in line for line in claims)


def test_a_curve_that_stays_below_never_crosses(tmp_path):
    low = Group(DENOISED, [make_run(tmp_path / "b", [1, 2], [1, 1], 0.4, [1.0])])
    assert iterations_until(low, 2.0) == 100
    assert iterations_until(low, 3.0) == float("inf")


def test_ablations_are_held_against_the_whole_and_against_matching_alone(groups):
    claims = check_claims([groups[0], groups[1], Group("no attention mask", groups[0].runs[1:])])
    assert claims[-1] == (
        "- no attention mask ends below the whole: yes (AP 28.0: -14.0 to the whole, -2.0 to matching alone)"
    )


def test_a_page_says_what_was_done_on_what_and_shows_the_curves(tmp_path, capsys):
    """From runs that lie there: command, seeds, machine, table, claims, picture."""
    for variant in variants_of("deformable"):
        made = [0, 5, 20] if variant.name == MATCHING else [0, 20, 30]
        for seed in (4, 5):
            folder = Path(configure(FOLDER / "deformable.yaml", variant, seed, tmp_path / "runs", []).OUTPUT_DIR)
            make_run(folder, made, [2, 2, 1], 0.5, [1.0], 300 if variant.name == HALF else 600)
            text = f"SOLVER: {{MAX_ITER: {int(600 * variant.share)}}}\nSEED: {seed}\n"
            (folder / "config.yaml").write_text(f"{text}DATASETS: {{TRAIN: [shapes_train], TEST: [b]}}\n")
    line = ["--report", "--pairs", "deformable", "--seeds", "4", "5", "--runs", str(tmp_path / "runs")]
    assert main([*line, "--output", str(tmp_path / "pages")]) == 0
    page = (tmp_path / "pages" / "deformable.md").read_text()
    assert page in capsys.readouterr().out
    parts = (
        "# deformable: shapes_train, 600 iterations",
        "python dev/compare_runs.py",
        "seeds [4, 5]",
        "CPU cores",
        "Evaluated on b.",
        "| with denoising",
        "30.0 (30.0 to 30.0)",
        "- ends higher: yes",
        "![Curves](deformable.png)",
    )
    for part in parts:
        assert part in page
    pixels = np.asarray(Image.open(tmp_path / "pages" / "deformable.png").convert("L"))
    assert pixels.shape[0] > 500
    assert (pixels < 250).mean() > 0.02


def final_weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_what_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path):
    """Two trainings that were killed at different iterations; resumed once more at the end, nothing is trained."""
    variants, config = variants_of("deformable")[:2], FOLDER / "deformable.yaml"
    whole = train_interleaved(config, variants, 3, tmp_path / "whole", SMALL, 1)
    for variant, steps in zip(variants, (3, 1), strict=True):
        run = InterleavedRun(configure(config, variant, 3, tmp_path / "cut", SMALL))
        for _ in range(steps):
            run.advance()
    for _ in range(2):
        cut = train_interleaved(config, variants, 3, tmp_path / "cut", SMALL, 1, resume=True)
        for first, second in zip(whole, cut, strict=True):
            expected, found = final_weights(first), final_weights(second)
            assert all(torch.equal(expected[name], x) for name, x in found.items())
            assert len((second / "step_seconds.txt").read_text().split()) == 4
            assert turns_of(first) == {folder.name for folder in whole}
            assert turns_of(second) == {second.name}  # their first steps were made by themselves
    written = [(folder / "model_0000001.pth").stat().st_mtime_ns for folder in cut]
    assert written[0] < written[1]


def test_variants_can_be_trained_by_themselves(tmp_path, monkeypatch, capsys):
    """In another process, or on another machine; only then is anything reported."""
    calls = []

    def fake(config, variants, seed, output, *_):
        calls.append((config.stem, [variant.name for variant in variants], seed))
        folders = folders_of(config, variants, seed, output, [])
        for folder, variant in zip(folders, variants, strict=True):
            make_run(folder, [0, 5, 20], [2, 2, 1], 0.5, [1.0], int(600 * variant.share))
            (folder / "config.yaml").write_text(f"SOLVER: {{MAX_ITER: {int(600 * variant.share)}}}\nSEED: {seed}\n")
        return folders

    class Here:
        """A pool of this process."""

        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, function, *arguments):
            found = function(*arguments)
            return SimpleNamespace(result=lambda: found)

    monkeypatch.setattr("dev.compare_runs.train_interleaved", fake)
    monkeypatch.setattr("dev.compare_runs.ProcessPoolExecutor", Here)
    line = ["--pairs", "deformable", "--seeds", "4", "--runs", str(tmp_path)]
    assert main([*line, "--variants", HALF, MATCHING]) == 0
    assert calls == [("deformable", [MATCHING, HALF], 4)]
    out = capsys.readouterr().out
    assert [Path(row.removeprefix("trained: ")).is_dir() for row in out.splitlines()] == [True, True]
    assert not list(tmp_path.glob("*.md"))
    assert main(["--report", *line, "--variants", HALF, MATCHING]) == 2
    assert naming(DENOISED, HALF).search(capsys.readouterr().err)
    assert main(["--pairs", "detr", "--seeds", "4", "--runs", str(tmp_path), "--variants", HALF]) == 2
    assert naming("detr", HALF, MATCHING).search(capsys.readouterr().err)


LONG = ROOT / "docs" / "evidence" / "long"
RUNS = sorted(x.parent for x in LONG.glob("**/runs/*/metrics.json"))


@pytest.mark.parametrize(
    ("folder", "pair", "seeds", "variants"),
    [
        ("", "bccd_dino", "1", []),
        ("", "shapes_hard_deformable", "1 2 3", []),
        ("is200", "shapes_hard_deformable", "1", [MATCHING, DENOISED]),
    ],
)
def test_the_pages_of_the_evidence_come_from_the_runs_that_are_kept_without_the_data(
    tmp_path, monkeypatch, folder, pair, seeds, variants
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    evidence = LONG / folder
    line = ["--report", "--pairs", pair, "--seeds", *seeds.split(), "--runs", str(evidence / "runs")]
    line += ["--variants", *variants] if variants else []
    assert main([*line, "--output", str(tmp_path)]) == 0
    ours, theirs = ((folder / f"{pair}.md").read_text().splitlines()[3:] for folder in (tmp_path, evidence))
    assert ours == theirs


def test_what_is_kept_of_a_training_gives_the_same_report(tmp_path):
    """Losses of parts, other layers and keys of the config that a report does not read are left out."""
    whole = tmp_path / RUNS[0].name
    whole.mkdir()
    lines = [json.loads(line) for line in (RUNS[0] / "metrics.json").read_text().splitlines()]
    more = {"main/class": 0.123456789, "instability/layer_0": 3.0, "bbox/AP-circle": 40.0}
    with (whole / "metrics.json").open("w") as file:
        for line in lines:
            finer = {key: x * (1 + 1e-7) if isinstance(x, float) else x for key, x in line.items()}
            file.write(json.dumps(finer | more) + "\n")
    config = yaml.safe_load((RUNS[0] / "config.yaml").read_text())
    config["OUTPUT_DIR"], config["MODEL"]["WEIGHTS"] = str(whole), "/secret/model.pth"
    (whole / "config.yaml").write_text(yaml.safe_dump(config))
    seconds = (RUNS[0] / "step_seconds.txt").read_text().split()
    (whole / "step_seconds.txt").write_text("".join(f"{float(x) + 1e-5}\n" for x in seconds))
    (whole / "in_turn.txt").write_text("a\nb\n")
    kept = keep(whole, tmp_path / "kept")
    assert turns_of(kept) == {"a", "b"}
    for name in ("metrics.json", "config.yaml", "step_seconds.txt"):
        assert (kept / name).read_text() == (RUNS[0] / name).read_text()
    assert sum(path.stat().st_size for path in kept.iterdir()) < 60_000
    rows = [table_rows([Group(MATCHING, [read_run(x)])]) for x in (whole, kept)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("run", RUNS, ids=[str(run.relative_to(LONG)) for run in RUNS])
def test_what_is_kept_is_kept_as_it_is(run, tmp_path):
    kept = keep(run, tmp_path)
    assert all((kept / path.name).read_text() == path.read_text() for path in run.iterdir())


def test_those_that_are_behind_come_first():
    """Iterations in the order in which they are made, of two trainings at 2 and at 0 of 4."""
    order = []

    class Counter:
        def __init__(self, name, iteration):
            self.name, self.trainer = name, SimpleNamespace(iter=iteration, max_iter=4)

        @property
        def done(self):
            return self.trainer.iter == 4

        def advance(self):
            order.append((self.name, self.trainer.iter))
            self.trainer.iter += 1

    advance_in_turn([Counter("a", 2), Counter("b", 0)], "")
    assert order == [("b", 0), ("b", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 3)]


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """A folder of data sets with a bccd of two images."""
    images = tmp_path / "bccd" / "images"
    images.mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (30, 20)).save(images / f"{name}.png")
    for split in ("train", "val", "test"):
        (tmp_path / "bccd" / f"{split}.json").write_text(json.dumps(valid_coco()))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    yield
    for split in {"bccd_train", "bccd_val", "bccd_test"} & set(DatasetCatalog.list()):
        DatasetCatalog.remove(split)
        MetadataCatalog.remove(split)


@pytest.mark.parametrize("pair", LONG_PAIRS)
def test_long_pairs_differ_in_denoising_and_have_a_half_schedule(pair, cells, tmp_path):
    variants = variants_of(pair)
    assert [variant.name for variant in variants] == [MATCHING, DENOISED, HALF]
    alone, denoised, half = (
        dict(leaves(configure(FOLDER / f"{pair}.yaml", variant, 1, tmp_path, []))) for variant in variants
    )
    differing = {key for key in alone if alone[key] != denoised[key]} - {"OUTPUT_DIR"}
    assert differing == {"MODEL.DN_DETR.DENOISING.NAME"}
    shorter = {"SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS"}
    assert {key for key in half if half[key] != denoised[key]} - {"OUTPUT_DIR"} == shorter
    assert all(int(half[key]) * 2 == int(denoised[key]) for key in shorter)


def test_comparisons_of_different_kinds_lie_in_folders_of_their_own():
    lines = ([], ["--quick"], ["--ablations"], ["--quick", "--ablations", "1 group"])
    found = [parse_arguments(line) for line in lines]
    assert len({args.runs for args in found}) == len(lines)
    assert all(args.runs == args.output for args in found)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--jobs", "0"], ["error: ", "--jobs", 0]),
        (["--threads", "-1"], ["error: ", "--threads", -1]),
        (["--report", "--runs", "somewhere", "--keep", "./somewhere"], ["error: ", "--keep", "--runs"]),
        (["--jobs", "1", "--pairs", "bccd_dino"], ["nowhere", "train.json"]),
        (["--report", "--pairs", "dense", "--seeds", "1"], ["metrics.json", "OUTPUT_DIR"]),
        (["--backbone", "nowhere.pth"], ["'nowhere.pth'"]),
        (["--jobs", "1", "--pairs", "dense", "--opts", "SOLVER.MAX_ITR", "3"], ["SOLVER.MAX_ITR", "SOLVER.MAX_ITER"]),
    ],
)
def test_bad_input_is_one_sentence(arguments, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "nowhere")
    assert main(["--runs", str(tmp_path), *arguments]) == 2
    assert naming(*named).search(capsys.readouterr().err.splitlines()[-1])


HOST = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from dn_detr_d2.engine import end_with_parent
if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 60).result()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_comparison_that_is_killed_takes_its_processes_with_it():
    with subprocess.Popen([sys.executable, "-c", HOST], cwd=ROOT, stdout=subprocess.PIPE, text=True) as host:
        worker = Path(f"/proc/{host.stdout.readline().strip()}/stat")
        assert worker.exists()
        host.send_signal(signal.SIGTERM)
        for _ in range(100):
            if not worker.exists() or worker.read_text().split()[2] == "Z":
                return
            time.sleep(0.05)
    raise AssertionError("the worker outlived its parent by five seconds")
