"""DN-DETR: query denoising for any detector with object queries, and for Detectron2 the detectors that it trains.

Where Detectron2 is installed, importing this package registers its models and the embedded data set with it. Without
Detectron2, what needs torch alone can be used: denoising, losses, boxes, structures, deformable attention.
"""

import importlib
import importlib.util
import warnings

from .utils.requirements import is_installed

__version__ = "0.1.0"

# Public name -> the module it comes from, imported when the name is first asked for.
_HOME = {
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "ContrastiveDenoisingGenerator": "denoising",
    "DatasetError": "errors",
    "DenoisingDETR": "modeling",
    "DenoisingGenerator": "denoising",
    "DenoisingQueries": "denoising",
    "HungarianMatcher": "losses",
    "LeakError": "errors",
    "MultiScaleDeformableAttention": "layers",
    "NoisedTargets": "denoising",
    "QueryDenoising": "denoising",
    "SetCriterion": "losses",
    "SoftmaxCriterion": "losses",
    "UserError": "errors",
    "add_dn_detr_config": "config",
    "check_isolation": "denoising",
    "cxcywh_to_xyxy": "boxes",
    "ms_deform_attn": "layers",
    "setup_cfg": "engine.setup",
    "xyxy_to_cxcywh": "boxes",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    """Public names, and modules of the package, on first use (PEP 562)."""
    if name not in _HOME:
        if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{name}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    """Registers models and the embedded data set with Detectron2."""
    with warnings.catch_warnings():
        # PyTorch's word on functions that fvcore and detectron2 compile when they are imported; no user can mend it.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script(_method)?` is deprecated", FutureWarning)
        importlib.import_module(f"{__name__}.modeling")
        importlib.import_module(f"{__name__}.data")
    # The authors' checkpoints hold an argparse namespace; Detectron2's own loader shall read them too, and nothing worse.
    importlib.import_module(f"{__name__}.checkpoint").allow_plain_types()


if is_installed("detectron2"):
    _register()
