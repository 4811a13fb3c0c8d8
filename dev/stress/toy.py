"""The training under test: a detector of 150,000 weights on the embedded shapes, started by a fork.

The parent has imported everything, so a start takes a second. Nothing of PyTorch may have computed in the parent, because a
fork loses its threads.
"""

import os
import traceback
from itertools import chain
from pathlib import Path

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.utils.env import seed_all_rng
from torch import nn

from dn_detr_d2 import setup_cfg
from dn_detr_d2.engine import StopRequest, Trainer
from dn_detr_d2.engine.launch import launch

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
TOY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.NAME": "PocketBackbone",
    "MODEL.DN_DETR.HIDDEN_DIM": 64,
    "MODEL.DN_DETR.DECODER.NUM_LAYERS": 2,
    "MODEL.DN_DETR.ENCODER.DROPOUT": 0.1,
    "DATASETS.TEST": (),
    "INPUT.MIN_SIZE_TRAIN": (40, 48),
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.CHECKPOINTS_KEPT": 2,
    "SEED": 5,
}


@BACKBONE_REGISTRY.register()
class PocketBackbone(Backbone):
    """Two strided convolutions: a checkpoint has few tensors and is soon written."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.res3, self.res4 = nn.Conv2d(3, 8, 8, stride=8), nn.Conv2d(8, 16, 2, stride=2)

    def forward(self, x) -> dict:
        """(N, 3, H, W) -> maps of a 8th and a 16th."""
        res3 = self.res3(x).relu()
        return {"res3": res3, "res4": self.res4(res3).relu()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """As of Detectron2's backbones."""
        return {"res3": ShapeSpec(channels=8, stride=8), "res4": ShapeSpec(channels=16, stride=16)}

    @property
    def size_divisibility(self) -> int:
        """What sizes are padded to."""
        return 16


def make_cfg(folder: Path, options: list):
    """The config of the toy that writes into ``folder``."""
    return setup_cfg(str(CONFIG), [*chain(*TOY.items()), *options, "OUTPUT_DIR", str(folder)])


def train(folder: str, options: list) -> None:
    """Trains from the last checkpoint of the folder, or from the start if there is none."""
    torch.set_num_threads(1)
    seed_all_rng(5)
    request = StopRequest()
    request.listen()
    trainer = Trainer(make_cfg(Path(folder), options), request)
    trainer.resume_or_load(resume=True)
    Path(folder, "started").touch()
    trainer.train()


def start_run(folder: Path, options: list, processes: int = 1) -> int:
    """Starts a training in a process group of its own and returns its process id. Its output goes to :func:`log_of`."""
    (folder / "started").unlink(missing_ok=True)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        log = os.open(log_of(folder), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = launch(train, processes, 1, 0, "auto", 60, (str(folder), options))
    except SystemExit as request:
        code = request.code
    except BaseException:  # whatever it is, this copy of the process ends here
        traceback.print_exc()
    finally:
        os._exit(code)


def log_of(folder: Path) -> Path:
    """Output of all runs of a folder; the file lies outside of it, where the disk is never full."""
    return folder.parent / f"{folder.name}.log"


def differing(first, second, where: str = "") -> list[str]:
    """Names of the entries that are not bitwise identical in two checkpoints."""
    if isinstance(first, dict):
        keys = first.keys() | second.keys()
        return [n for key in keys for n in differing(first.get(key), second.get(key), f"{where}.{key}")]
    if isinstance(first, list | tuple):
        pairs = enumerate(zip(first, second, strict=True))
        return [name for i, (a, b) in pairs for name in differing(a, b, f"{where}.{i}")]
    same = first.equal(second) if isinstance(first, torch.Tensor) else first == second
    return [] if same else [where]


def load(folder: Path, name: str = "model_final") -> dict:
    """A checkpoint without the config, which names the folder."""
    content = torch.load(Path(folder, f"{name}.pth"), map_location="cpu", weights_only=True)
    return {key: value for key, value in content.items() if key != "config"}
