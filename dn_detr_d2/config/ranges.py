"""Ranges of values, for keys whose readers would not notice a value that makes no sense.

Types are checked when files are merged, names when a part is looked up, and combinations of keys where the model is built.
"""

import math
from collections.abc import Callable, Iterator, Sequence

from ..errors import ConfigError

_ROOT = "MODEL.DN_DETR."
_POSITIVE = [
    "DIST_TIMEOUT",
    "INPUT.IMAGE_SIZE",
    "INPUT.MAX_SIZE_TEST",
    "INPUT.MAX_SIZE_TRAIN",
    "INPUT.MIN_SCALE",
    "MODEL.DN_DETR.DENOISING.BOX_NOISE.REFERENCE_SIZE",
    "MODEL.DN_DETR.LOSS.GIOU_EPS",
    "MODEL.DN_DETR.MASK.NUM_POINTS",
    "MODEL.DN_DETR.MASK.TEMPERATURE",
    "MODEL.DN_DETR.NECK.POSITION_TEMPERATURE",
    "SOLVER.ACCUMULATION_STEPS",
    "SOLVER.BASE_LR",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
    "SOLVER.GAMMA",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.MAX_ITER",
    "SOLVER.NUM_DECAYS",
    "SOLVER.POLY_LR_POWER",
    "TEST.DETECTIONS_PER_IMAGE",
    "TEST.IMS_PER_BATCH",
    "SEMI_SUPERVISED.UNLABELED_RATIO",
    "TEST.INSTABILITY.ATD_K",
]
_NOT_NEGATIVE = [
    "DATALOADER.NUM_WORKERS",  # 0 = in this process
    "INPUT.MIN_SIZE_TEST",  # 0 = images are not resized
    "MODEL.DN_DETR.DENOISING.CORNER_NOISE_SCALE",
    "MODEL.DN_DETR.DENOISING.LOSS_WEIGHT",
    "MODEL.DN_DETR.DENOISING.MAX_QUERIES",
    "MODEL.DN_DETR.DENOISING.NOISE_SCHEDULE.END",
    "MODEL.DN_DETR.DENOISING.NOISE_SCHEDULE.START",
    "MODEL.DN_DETR.DENOISING.NUM_QUERIES",
    "MODEL.DN_DETR.DENOISING.MASK_LAYERS",
    "MODEL.DN_DETR.SIZE_DIVISIBILITY",
    "SOLVER.BACKBONE_MULTIPLIER",
    "SOLVER.BASE_LR_END",
    "SOLVER.CHECKPOINTS_KEPT",
    "SOLVER.EARLY_STOPPING.MIN_DELTA",
    "SOLVER.EARLY_STOPPING.PATIENCE",
    "SOLVER.NONFINITE_LIMIT",
    "SOLVER.SAMPLING_MULTIPLIER",
    "SOLVER.WARMUP_FACTOR",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.WEIGHT_DECAY",
    "SOLVER.WEIGHT_DECAY_NORM",
    "SEMI_SUPERVISED.BURN_IN",
    "SEMI_SUPERVISED.DENOISING_WEIGHT",
    "SEMI_SUPERVISED.LOSS_WEIGHT",
    "SEMI_SUPERVISED.NOISE_GROWTH",
    "TEST.CUDA_GRAPHS",
    "TEST.INSTABILITY.NUM_IMAGES",
    "TEST.INSTABILITY.PERIOD",
    "TEST.TILE.SIZE",
    "TEST.VALIDATION_LOSS",
]
_FINITE = [
    "MODEL.DN_DETR.DECODER.FIRST_SIZE_BIAS",
    "MODEL.DN_DETR.DENOISING.CENTER_NOISE_SCALE",
    "MODEL.DN_DETR.DENOISING.LABEL_NOISE_PROB",
    "MODEL.DN_DETR.DENOISING.SIZE_NOISE_SCALE",
    "MODEL.DN_DETR.LOSS.CLASS_WEIGHT",
    "MODEL.DN_DETR.LOSS.DICE_WEIGHT",
    "MODEL.DN_DETR.LOSS.GIOU_WEIGHT",
    "MODEL.DN_DETR.LOSS.L1_WEIGHT",
    "MODEL.DN_DETR.LOSS.MASK_WEIGHT",
    "MODEL.DN_DETR.LOSS.NO_OBJECT_WEIGHT",
    "MODEL.DN_DETR.MATCHER.CLASS_COST",
    "MODEL.DN_DETR.MATCHER.DICE_COST",
    "MODEL.DN_DETR.MATCHER.GIOU_COST",
    "MODEL.DN_DETR.MATCHER.L1_COST",
    "MODEL.DN_DETR.MATCHER.MASK_COST",
    "MODEL.DN_DETR.NECK.POSITION_OFFSET",
]


def _number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _strings(x) -> bool:
    return isinstance(x, list | tuple) and all(isinstance(name, str) for name in x)


def _sizes(x) -> bool:
    return isinstance(x, list | tuple) and len(x) > 0 and all(type(size) is int and size > 0 for size in x)


def _steps(x) -> bool:
    """Whether ``x`` holds positive integers, each larger than the one before; it may hold none."""
    whole = isinstance(x, list | tuple) and all(type(step) is int for step in x)
    return whole and all(before < step for before, step in zip((0, *x), x, strict=False))


def _three(x) -> bool:
    return isinstance(x, list | tuple) and len(x) == 3 and all(_number(c) and math.isfinite(c) for c in x)


# (keys, what a value must be, the test); "not a number" fails every comparison and with it every test.
CHECKS: tuple[tuple[Sequence[str], str, Callable], ...] = (
    (_POSITIVE, "be positive", lambda x: 0 < x < math.inf),
    (_NOT_NEGATIVE, "be finite and not negative", lambda x: 0 <= x < math.inf),
    (_FINITE, "be finite", math.isfinite),
    (
        (
            f"{_ROOT}LOSS.FOCAL_ALPHA",
            f"{_ROOT}MASK.IMPORTANCE_SAMPLE_RATIO",
            f"{_ROOT}MASK.OBJECT_THRESHOLD",
            f"{_ROOT}MASK.OVERLAP_THRESHOLD",
            "MODEL.WEIGHTS_MATCHED",
            "SEMI_SUPERVISED.NMS",
            "SEMI_SUPERVISED.THRESHOLD",
            "TEST.NMS",
        ),
        "lie in [0, 1]",
        lambda x: 0 <= x <= 1,
    ),
    ((f"{_ROOT}MASK.OVERSAMPLE_RATIO",), "be at least 1", lambda x: 1 <= x < math.inf),
    (
        (f"{_ROOT}LOSS.FOCAL_GAMMA",),
        "be 0 or at least 1 (between them gradients are infinite)",
        lambda x: x == 0 or 1 <= x < math.inf,
    ),
    ((f"{_ROOT}DECODER.LOGIT_EPS",), "lie between 0 and 0.5", lambda x: 0 < x < 0.5),
    (
        (
            f"{_ROOT}DENOISING.KNOWN_FRACTION",
            "MODEL.SWIN.DROP_PATH_RATE",
            "MODEL.VIT.DROP_PATH_RATE",
            "MODEL_EMA.DECAY",
            "TEST.TILE.OVERLAP",
        ),
        "lie in [0, 1)",
        lambda x: 0 <= x < 1,
    ),
    ((f"{_ROOT}DENOISING.KNOWN_SEED",), "lie in [0, 2^32)", lambda x: 0 <= x < 2**32),
    (("TEST.MAX_DETECTIONS_EVALUATED",), "be 0 or more than 10", lambda x: x == 0 or 10 < x < math.inf),
    (("MODEL.PIXEL_MEAN",), "be three numbers", _three),
    (("MODEL.PIXEL_STD",), "be three positive numbers", lambda x: _three(x) and min(x) > 0),
    (("INPUT.CROP.RESIZE", "INPUT.MIN_SIZE_TRAIN"), "be positive numbers of pixels", _sizes),
    (("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA",), "lie in (0, 1]", lambda x: 0 < x <= 1),
    (("SOLVER.STEPS",), "be positive iterations in ascending order", _steps),
    (("INPUT.CROP.SIZE",), "be [smallest, largest] in pixels", lambda x: _sizes(x) and len(x) == 2 and x[0] <= x[1]),
    (
        (
            *(f"{_ROOT}CLASS_NAMES", f"{_ROOT}IN_FEATURES", "MODEL.FREEZE"),
            *("LOGGERS", "SEMI_SUPERVISED.LOSSES", "TEST.AP_CLASSES"),
        ),
        "be a list of names",
        _strings,
    ),
)


def flatten(cfg: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(full key, value) of every leaf of a config."""
    for key, value in cfg.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_ranges(cfg: dict) -> None:
    """Refuses values that no key can have, then those that a key of ours cannot have; raises ConfigError."""
    values = dict(flatten(cfg))
    for key, value in values.items():
        _check_numbers(key, value)
    for keys, must, test in CHECKS:
        for key in keys:
            switched_off = key.startswith("INPUT.CROP.") and not values["INPUT.CROP.ENABLED"]
            if not switched_off and (values[key] is None or not test(values[key])):
                raise ConfigError(f"{key} must {must}, got {values[key]!r}")
    _check_schedule(values)
    if not values["INPUT.MIN_SCALE"] <= values["INPUT.MAX_SCALE"] < math.inf:
        raise ConfigError(
            f"INPUT.MAX_SCALE must be finite and at least INPUT.MIN_SCALE = {values['INPUT.MIN_SCALE']}, got "
            f"{values['INPUT.MAX_SCALE']}"
        )
    sizes = values["INPUT.MIN_SIZE_TRAIN"]
    if values["INPUT.MIN_SIZE_TRAIN_SAMPLING"] == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
        raise ConfigError(
            f"INPUT.MIN_SIZE_TRAIN must be (smallest, largest) where INPUT.MIN_SIZE_TRAIN_SAMPLING is 'range', got {sizes!r}"
        )


def _check_schedule(values: dict) -> None:
    """Refuses what the scheduler of ``SOLVER.LR_SCHEDULER_NAME`` would end the training for."""
    name, steps, end = (values[f"SOLVER.{key}"] for key in ("LR_SCHEDULER_NAME", "STEPS", "MAX_ITER"))
    if name == "WarmupMultiStepLR" and end in steps:
        raise ConfigError(
            f"SOLVER.STEPS must not hold SOLVER.MAX_ITER = {end}, where the training is over, got {steps!r}; take it out"
        )
    last, first = values["SOLVER.BASE_LR_END"], values["SOLVER.BASE_LR"]
    if name == "WarmupCosineLR" and last > first:
        raise ConfigError(f"SOLVER.BASE_LR_END must be at most SOLVER.BASE_LR = {first}, got {last}")


def _check_numbers(key: str, value) -> None:
    """Refuses what is not a number, and integers that no tensor can count."""
    if isinstance(value, list | tuple):
        for part in value:
            _check_numbers(key, part)
    elif value is None and key.startswith(_ROOT) and key != f"{_ROOT}NUM_CLASSES":
        raise ConfigError(f"{key} must have a value, got null; leave the line out for the default")
    elif isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{key} must be a number, got {value!r}")
    elif isinstance(value, int) and value.bit_length() > 63:
        raise ConfigError(f"{key} is out of range, got an integer of {value.bit_length()} bits; write a smaller one")
