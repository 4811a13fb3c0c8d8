"""A training of seconds for tests of what stops and goes on; DATASETS.TEST is empty."""

import shutil
from pathlib import Path

import torch
from conftest import ROOT, SYSTEMS, TOY
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from dev.stress.toy import differing, load
from dn_detr_d2 import setup_cfg
from dn_detr_d2.data import build_train_loader
from dn_detr_d2.engine import Trainer
from dn_detr_d2.engine.optimizer import build_lr_scheduler, build_optimizer

__all__ = [
    "CASCADE",
    "LEARNING",
    "MASKS",
    "NARROW_RCNN",
    "RCNN",
    "command",
    "differing",
    "learn",
    "load",
    "make_cfg",
    "make_rcnn_cfg",
    "rates_of",
    "stop_at",
    "train",
]

OPTIONS = [
    *(*TOY, "DATASETS.TRAIN", ("shapes_train",), "DATALOADER.NUM_WORKERS", 0, "REPORT", "never"),
    *("MODEL.DN_DETR.NUM_CLASSES", "auto"),
    *("INPUT.MIN_SIZE_TRAIN", (40, 48), "INPUT.MIN_SIZE_TEST", 48, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 6),
    *("INPUT.CROP.RESIZE", (48, 56), "INPUT.CROP.SIZE", (30, 40), "MODEL.DN_DETR.ENCODER.DROPOUT", 0.1),
    *("SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.STEPS", (5,), "SEED", 7, "MODEL.DN_DETR.DECODER.NUM_LAYERS", 2),
]


def make_cfg(folder, *overrides, config=SYSTEMS["dn_detr"]):
    """The config of a training that writes into ``folder``."""
    return setup_cfg(str(ROOT / "configs" / f"{config}.yaml"), [*OPTIONS, *overrides, "OUTPUT_DIR", str(folder)])


# A Faster R-CNN as narrow as it goes.
NARROW_RCNN = [
    *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 3),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]),
]
CASCADE = ["MODEL.ROI_HEADS.NAME", "DenoisingCascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
MASKS = ["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"]
MASKS += ["MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8]
# One whose every region is sampled, the same number in each image.
RCNN = [
    *(*NARROW_RCNN, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 4096),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 12, "MODEL.RPN.POST_NMS_TOPK_TEST", 12, "MODEL.RPN.NMS_THRESH", 0.95),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1000, "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False),
    *("SOLVER.WARMUP_ITERS", 0),
]


def make_rcnn_cfg(folder, *overrides):
    """:func:`make_cfg` of Faster R-CNN with denoising."""
    return make_cfg(folder, *RCNN, *overrides, config="faster_rcnn_dn_R50_FPN_12ep")


def train(cfg, resume=False, seed=0):
    """Trains; ``seed`` is of the random streams before anything is made."""
    torch.set_num_threads(1)
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    seed_all_rng(seed)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


LEARNING = ["INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.CROP.ENABLED", False, "INPUT.RANDOM_FLIP", "none", "SEED", 3]
LEARNING += ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.BASE_LR", 1e-3, "SOLVER.BACKBONE_MULTIPLIER", 1.0]
LEARNING += ["MODEL.RESNETS.NORM", "BN", "SOLVER.OPTIMIZER", "ADAMW"]


def learn(cfg, steps, *parts):
    """(steps, parts) sums of losses by the beginning of their names, of a training on five batches again and again."""
    loader = iter(build_train_loader(cfg))
    batches = [next(loader) for _ in range(5)]
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    history = torch.zeros(steps, len(parts))
    for i in range(steps):
        with EventStorage():
            losses = model(batches[i % len(batches)])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        for j, part in enumerate(parts):
            history[i, j] = sum(value.item() for name, value in losses.items() if name.startswith(part))
    return history


def command(folder, *options, overrides=()):
    """The same training as :func:`train` with seed 7, as a command line of train_net.py."""
    config = ROOT / "configs" / f"{SYSTEMS['dn_detr']}.yaml"
    changes = [str(x) for x in (*OPTIONS, *overrides, "OUTPUT_DIR", folder)]
    return [str(ROOT / "train_net.py"), "--config-file", str(config), *options, *changes]


def stop_at(folder, name, target):
    """A folder as a stop after the checkpoint ``name`` leaves it."""
    target.mkdir()
    for file in folder.glob(f"{name}.pth*"):
        shutil.copy(file, target)
    (target / "last_checkpoint").write_text(f"{name}.pth")


def rates_of(cfg):
    """(MAX_ITER,) learning rates of a training."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], cfg.SOLVER.BASE_LR)
    scheduler, rates = build_lr_scheduler(cfg, optimizer), []
    for _ in range(cfg.SOLVER.MAX_ITER):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates
