"""DN-DETR for Detectron2: query denoising, the detectors it trains, and everything needed to use them.

Importing this package registers its models and the embedded data set with Detectron2.
"""

import warnings

with warnings.catch_warnings():
    # PyTorch's word on functions that fvcore and detectron2 compile when they are imported; no user can mend it.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script(_method)?` is deprecated", FutureWarning)
    try:
        import detectron2  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        raise ModuleNotFoundError(
            "dn_detr_d2 needs detectron2, which is not on PyPI; run: python tools/install_detectron2.py",
            name="detectron2",
        ) from None

    from .boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
    from .checkpoint import allow_plain_types
    from .config import add_dn_detr_config
    from .denoising import DenoisingGenerator, NoisedTargets
    from .engine.setup import setup_cfg
    from .errors import CheckpointError, ConfigError, DatasetError, LeakError, UserError
    from .layers import MultiScaleDeformableAttention, ms_deform_attn
    from .modeling import DenoisingDETR, HungarianMatcher, SetCriterion

# The authors' checkpoints hold an argparse namespace; Detectron2's own loader shall read them too, and nothing worse.
allow_plain_types()

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "DenoisingDETR",
    "DenoisingGenerator",
    "HungarianMatcher",
    "LeakError",
    "MultiScaleDeformableAttention",
    "NoisedTargets",
    "SetCriterion",
    "UserError",
    "add_dn_detr_config",
    "cxcywh_to_xyxy",
    "ms_deform_attn",
    "setup_cfg",
    "xyxy_to_cxcywh",
]
