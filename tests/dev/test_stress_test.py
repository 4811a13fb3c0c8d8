"""The stress test at its smallest, and the proof that it would find what it looks for."""

import random
import subprocess
import sys

import pytest
from conftest import ROOT
from naming import naming
from ranks import run_program

from dev.stress import endurance, mutations
from dev.stress.cases import run_cases
from dn_detr_d2.data import coco_custom, images, normalise


@pytest.mark.parametrize(
    ("arguments", "scenarios"),
    [
        (["sigkill", "graceful-stop", "write-failure", "bit-flips", "--times", "1"], 4),
        pytest.param(["--quick"], 8, marks=pytest.mark.long),
    ],
)
def test_the_quick_scenarios_find_no_violation(arguments, scenarios):
    """Kills, signals, failing writes, flipped bits; with --quick, more of them, and mutated files and crowded images."""
    line = [sys.executable, "dev/stress_test.py", *arguments]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("\n|") == 1 + scenarios


def test_a_reader_that_is_silent_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_compare_sums", lambda image: None)
    _, wrong = run_cases(mutations.image_cases(0), 1500, tmp_path, 1)
    assert any("PNG read with other pixels" in fault for fault in wrong)


def _without_annotation_5(annotation, *others, add=coco_custom._add):
    return None if annotation["id"] == 5 else add(annotation, *others)


@pytest.mark.parametrize(
    ("place", "name", "silent"),
    [
        (coco_custom, "_add", _without_annotation_5),  # a box that vanishes
        (coco_custom, "LEFT_OUT", {}),  # what is left out is not in the log
        (coco_custom, "_unique_keys", dict),  # the last of two values
        (normalise, "foreign_references", lambda content, field: {}),  # text against a number: left out, not refused
        (normalise, "is_unknown", lambda size: size in (None, 0, -1, 31)),  # a size that is known
        (coco_custom, "usable_area", lambda area: None),  # a usable area
        (normalise, "as_written", lambda entry: entry | {"iscrowd": 1} if isinstance(entry, dict) else entry),
    ],
)
def test_a_reader_of_annotations_that_is_silent_is_found(tmp_path, monkeypatch, place, name, silent):
    monkeypatch.setattr(place, name, silent)
    _, wrong = run_cases(mutations.annotation_cases(0), 3000, tmp_path, 1)
    assert any("Error(" not in fault for fault in wrong), wrong[:3]


def test_a_case_that_hangs_or_dies_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("dev.stress.cases.MAX_SECONDS", 0.5)

    def make(home):
        def case(number):
            while number == 3:
                pass
            if number == 5:
                raise KeyboardInterrupt
            return "WRONG answer" if number == 7 else "well"

        return case

    outcomes, wrong = run_cases(make, 9, tmp_path, 1)
    assert sorted(fault.split(" took")[0].split(" ended")[0] for fault in wrong) == [
        "case 3",
        "case 5",
        "case 7: answer",
    ]
    assert outcomes["well"] == 6


def test_a_step_that_dies_on_many_boxes_is_a_violation(tmp_path, monkeypatch):
    def in_child(step):
        return [1e8] if step.__defaults__[0] != 300 else None

    monkeypatch.setattr(endurance, "in_child", in_child)
    found = endurance.crowded_images(tmp_path)
    assert found.wrong
    assert "nan" in found.observed
    monkeypatch.setattr(endurance, "in_child", lambda step: [1e8])
    assert endurance.crowded_images(tmp_path).wrong == []


def test_mutations_are_a_function_of_their_number():
    whole = bytes(range(200))
    first, again = (mutations.mutated_bytes(whole, random.Random(5), whole) for _ in range(2))
    assert first == again
    assert sum(mutations.mutated_bytes(whole, random.Random(i), whole) != whole for i in range(100)) > 90


def test_an_unknown_scenario_is_refused():
    done = run_program("dev/stress_test.py", "drown")
    assert done.returncode == 2
    assert naming("drown").search(done.stderr)
