"""Refuses configs whose values would fail later with a less telling message."""

import torch
from detectron2.config import CfgNode

from ..errors import ConfigError
from ..utils.processor import slow_bfloat16
from .ranges import check_ranges

LOGGERS = ("wandb", "mlflow")


def check_config(cfg: CfgNode) -> None:
    """Refuses values that would fail later with a less telling message; the parts of the model check their own keys."""
    check_ranges(cfg)
    _check_diagnostics(cfg.TEST.INSTABILITY)
    num_classes = cfg.MODEL.DN_DETR.NUM_CLASSES
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise ConfigError(f"MODEL.DN_DETR.NUM_CLASSES must be a positive number or auto, got {num_classes!r}")
    choices = {
        "SOLVER.OPTIMIZER": ("ADAMW", "SGD"),
        "SOLVER.AMP.DTYPE": ("fp16", "bf16"),
        "SOLVER.NONFINITE": ("raise", "skip"),
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("full_model", "value", "norm"),
        "SOLVER.LR_SCHEDULER_NAME": (
            "WarmupMultiStepLR",
            "WarmupCosineLR",
            "WarmupStepWithFixedGammaLR",
            "WarmupPolyLR",
        ),
        "SOLVER.WARMUP_METHOD": ("linear", "constant"),
        "INPUT.AUGMENTATION": ("detr", "lsj", "semantic"),
        "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
        "INPUT.FORMAT": ("RGB", "BGR"),
        "INPUT.RANDOM_FLIP": ("none", "horizontal", "vertical", "both"),
        "MODEL.DN_DETR.OP_BACKEND": ("auto", "cuda", "cpu", "torch"),
        "MODEL.DN_DETR.COMPILE": ("", "encoder", "all"),
        "MODEL.DN_DETR.INITIALIZATION": ("detr", "dn_encoder_only", "anchor_detr"),
        "MODEL.DN_DETR.DENOISING.NOISE_SCHEDULE.NAME": ("constant", "linear", "cosine"),
        "MODEL.DN_DETR.LOSS.CLASS_LOSS": ("focal", "softmax"),
        "MODEL.DN_DETR.MATCHER.CLASS_COST_KIND": ("", "focal", "softmax"),
        "REPORT": ("auto", "always", "never"),
        "TEST.AMP": ("", "bf16", "fp16"),
        "TEST.COCO_EVAL": ("pycocotools", "faster_coco_eval"),
    }
    for key, known in choices.items():
        if _get(cfg, key) not in known:
            raise ConfigError(f"{key} must be one of {known}, got {_get(cfg, key)!r}")
    if unknown := [x for x in cfg.LOGGERS if x not in LOGGERS]:
        raise ConfigError(f"LOGGERS takes any of {LOGGERS}, got {unknown[0]!r}; TensorBoard is always written")
    if cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.TYPE != "absolute_range":
        raise ConfigError(f"INPUT.CROP.TYPE must be 'absolute_range' for DETR's crop, got {cfg.INPUT.CROP.TYPE!r}")
    mask = cfg.MODEL.DN_DETR.MASK
    if cfg.TEST.TILE.SIZE and mask.ENABLED and list(mask.OUTPUTS) != ["instances"]:
        raise ConfigError(
            f"TEST.TILE.SIZE = {cfg.TEST.TILE.SIZE} merges instances of tiles, but MODEL.DN_DETR.MASK.OUTPUTS is "
            f"{list(mask.OUTPUTS)}; set OUTPUTS to ['instances'], or SIZE to 0"
        )
    check_device(cfg)


def check_device(cfg: CfgNode) -> None:
    """Refuses a MODEL.DEVICE that is not there, or on which TEST.AMP or CUDA_GRAPHS do not work; raises ConfigError."""
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        raise ConfigError(f"MODEL.DEVICE must be cpu, cuda or cuda:N, got {cfg.MODEL.DEVICE!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"MODEL.DEVICE = {cfg.MODEL.DEVICE!r}, but PyTorch sees no GPU; add MODEL.DEVICE cpu")
    if cfg.TEST.COMPILE and cfg.TEST.CUDA_GRAPHS:
        raise ConfigError(
            f"TEST.COMPILE = True and TEST.CUDA_GRAPHS = {cfg.TEST.CUDA_GRAPHS} are two ways to the same; choose one"
        )
    if device.type == "cuda":
        return
    if cfg.TEST.CUDA_GRAPHS:
        raise ConfigError(
            f"TEST.CUDA_GRAPHS = {cfg.TEST.CUDA_GRAPHS} needs a GPU, got MODEL.DEVICE = {cfg.MODEL.DEVICE!r}; set it to 0"
        )
    if cfg.TEST.AMP == "fp16":
        raise ConfigError(
            f"TEST.AMP = 'fp16' needs a GPU, got MODEL.DEVICE = {cfg.MODEL.DEVICE!r}: on CPUs float16 is slower than "
            "float32; take 'bf16' or ''"
        )
    if cfg.TEST.AMP == "bf16" and (reason := slow_bfloat16()):
        raise ConfigError(f"TEST.AMP = 'bf16' does not help, {reason}; set it to '', or take a GPU")


def _check_diagnostics(node: CfgNode) -> None:
    scales = node.HEALTH_SCALES
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < float("inf") for x in scales):
        raise ConfigError(f"TEST.INSTABILITY.HEALTH_SCALES takes numbers that are not negative, got {list(scales)}")


def _get(cfg: CfgNode, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg
