"""The parts of docs/add_a_detector.md, run: they register, train, do not leak, and give every parameter a gradient."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, make_batch

from dn_detr_d2.modeling import DECODER_REGISTRY, QUERY_SOURCE_REGISTRY

PAGE = ROOT / "docs" / "add_a_detector.md"
OWN = ("MODEL.DN_DETR.QUERY_SOURCE.NAME", "GridAnchors", "MODEL.DN_DETR.DECODER.NAME", "AveragingDecoder")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page():
    """All Python blocks of the page, run one after the other in one namespace."""
    names = {"__name__": "my_parts"}
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec"), names)
    yield SimpleNamespace(**names)
    QUERY_SOURCE_REGISTRY._obj_map.pop("GridAnchors")
    DECODER_REGISTRY._obj_map.pop("AveragingDecoder")


@pytest.mark.parametrize("counts", [(2, 3), (0, 0)])
def test_every_parameter_of_the_detector_gets_a_gradient(page, toy_model, counts):
    model = toy_model("dn_detr", *OWN)
    assert type(model.query_source) is page.GridAnchors
    assert type(model.decoder.update) is page.Averaged
    assert page.without_gradient(model, make_batch(*counts)) == []


def test_it_does_not_leak_and_detects(page, toy_model):
    model = toy_model("dn_detr", *OWN)
    page.leaks(model, make_batch(3, 2))
    with torch.no_grad():
        assert len(model.eval()(make_batch(0, 0))) == 2


def test_the_loss_term_counts_in_the_matching_and_the_denoising_part(page, toy_cfg):
    losses = page.MyTrainer.build_model(toy_cfg("dn_detr", *OWN)).train()(make_batch(2, 3))
    assert {"main/centre", "aux/centre_0", "dn/centre"} <= losses.keys()
    assert 0 < losses["dn/centre"] < losses["dn/l1"]  # two of four numbers, weight 2 instead of 5


def test_the_config_of_the_page_names_parts_that_it_registers(page):
    [text] = blocks("yaml")
    node = yaml.safe_load(text)["MODEL"]["DN_DETR"]
    assert node["QUERY_SOURCE"]["NAME"] in QUERY_SOURCE_REGISTRY
    assert node["DECODER"]["NAME"] in DECODER_REGISTRY
    assert (ROOT / "configs" / yaml.safe_load(text)["_BASE_"]).is_file()


def test_files_and_names_on_the_page_exist():
    text = PAGE.read_text()
    for path in re.findall(r"`((?:modeling|denoising|losses|checkpoint|config)/\w+\.py)`", text):
        assert (ROOT / "dn_detr_d2" / path).is_file(), path
    for path in re.findall(r"`((?:tests|configs)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).is_file(), path


def test_the_program_of_the_page_is_a_training_program(tmp_path):
    """From outside: it registers the parts, refuses a config as train_net.py does, and ends with its exit code."""
    [program] = [block for block in blocks("text") if "train_net" in block]
    (tmp_path / "train_mine.py").write_text(program)
    (tmp_path / "my_parts.py").write_text("\n".join(blocks("python")))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "train_mine.py", "--config-file", "nowhere.yaml"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "nowhere.yaml" in done.stderr
