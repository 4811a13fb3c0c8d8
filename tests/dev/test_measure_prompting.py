"""The measurement of prompts: its tables, and what it says when a training is missing."""

import torch
from detectron2.structures import Boxes, Instances
from naming import naming
from torch import nn

from dev.measure_prompting import OnlyPresent, main, table


def test_a_table_has_the_mean_and_each_seed():
    seeds = [{("DN", "0.7"): 1.0, ("DN", "classes"): "a"}, {("DN", "0.7"): 2.5, ("DN", "classes"): "b"}]
    assert [x.strip() for x in table(seeds, "model").splitlines()[-1].split("|")[1:-1]] == [
        "DN",
        "1.8 (1.0, 2.5)",
        "a; b",
    ]
    turned = table(seeds, "share", turned=True).splitlines()
    assert [line.split("|")[1].strip() for line in turned] == [
        "share",
        "-" * (len(turned[0].split("|")[1])),
        "0.7",
        "classes",
    ]


def test_detections_of_absent_classes_are_left_out_and_the_model_is_told_nothing():
    found = Instances((4, 4), pred_boxes=Boxes(torch.rand(4, 4)), pred_classes=torch.tensor([0, 2, 1, 2]))

    class Model(nn.Module):
        def forward(self, batch):
            assert "labels" not in batch[0]
            return [{"instances": found} for _ in batch]

    kept = OnlyPresent(Model())([{"labels": [2, 3]}, {"labels": []}])
    assert [x["instances"].pred_classes.tolist() for x in kept] == [[2, 2], []]


def test_a_report_without_trainings_names_what_is_missing(tmp_path, capsys):
    assert main(["--report", "--seeds", "1", "--runs", str(tmp_path)]) == 2
    assert naming("--report", f"{tmp_path}/dab_seed1/model_final.pth").search(capsys.readouterr().err)
