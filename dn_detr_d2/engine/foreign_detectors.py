"""What the config of a meta-architecture that is not ours, such as Faster R-CNN, must and must not say."""

import logging

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, GeneralizedRCNN

from ..config import add_dn_detr_config
from ..errors import ConfigError

logger = logging.getLogger(__name__)

# Keys of MODEL.DN_DETR that count for every detector.
READ_BY_ALL = ("NUM_CLASSES", "CLASS_NAMES")
# Keys of TEST that other detectors do not read -> what to do besides setting them back.
OURS_ALONE = {
    "HIDE_PADDING": "",
    "COMPILE": "",
    "CUDA_GRAPHS": "",
    "NMS": " and use MODEL.ROI_HEADS.NMS_THRESH_TEST, or what your detector has in its place",
}


def check_detector(cfg: CfgNode, *, training: bool) -> None:
    """Refuses what a meta-architecture of Detectron2 or of a user cannot do here; the log names keys that it does not read.

    Args:
        cfg: complete.
        training: whether it is for a training, which needs annotations that can be read.

    Raises:
        ConfigError: the meta-architecture is not known, it needs annotations that are not read, or keys of denoising are
            set and it would train without.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCH_REGISTRY:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE = {name!r}: No object named {name!r} is registered; use DenoisingDETR, or "
            "GeneralizedRCNN with MODEL.ROI_HEADS.NAME DenoisingROIHeads"
        )
    if hasattr(META_ARCH_REGISTRY.get(name), "forward_outputs"):
        return
    node, default = cfg.MODEL.DN_DETR, get_cfg()
    add_dn_detr_config(default)
    if asked := [key for key in OURS_ALONE if cfg.TEST[key] != default.TEST[key]]:
        raise ConfigError(
            f"TEST.{asked[0]} = {cfg.TEST[asked[0]]} is for DenoisingDETR, but MODEL.META_ARCHITECTURE is {name!r}; set it "
            f"to {default.TEST[asked[0]]}{OURS_ALONE[asked[0]]}"
        )
    changed = [key for key, value in node.items() if value != default.MODEL.DN_DETR[key] and key not in READ_BY_ALL]
    if training:
        _refuse_other_annotations(cfg)
    _refuse_lost_denoising(cfg, "DENOISING" in changed)
    if unread := sorted({*changed} - {"DENOISING"}):
        logger.warning("MODEL.META_ARCHITECTURE = %s does not read MODEL.DN_DETR.%s", name, ", ".join(unread))
    if "MSRA" in cfg.MODEL.WEIGHTS and cfg.INPUT.FORMAT != "BGR":
        logger.warning(
            "MODEL.WEIGHTS = %s is for INPUT.FORMAT BGR, PIXEL_MEAN [103.53, 116.28, 123.675] and PIXEL_STD [1, 1, 1], but "
            "INPUT.FORMAT is %s; see configs/Base-Detectron2-Defaults.yaml",
            cfg.MODEL.WEIGHTS,
            cfg.INPUT.FORMAT,
        )


def _refuse_other_annotations(cfg: CfgNode) -> None:
    """Boxes are read, and masks for mask heads."""
    name = cfg.MODEL.META_ARCHITECTURE
    needed = {
        "key points": cfg.MODEL.KEYPOINT_ON,
        "precomputed proposals": cfg.MODEL.LOAD_PROPOSALS,
        "semantic segmentation": name in ("PanopticFPN", "SemanticSegmentor"),
    }
    if missing := [what for what, asked in needed.items() if asked]:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE = {name!r} with MODEL.KEYPOINT_ON = {cfg.MODEL.KEYPOINT_ON} and LOAD_PROPOSALS = "
            f"{cfg.MODEL.LOAD_PROPOSALS} trains on {missing[0]}, which are not read here, only boxes and masks; take "
            "GeneralizedRCNN with both False"
        )


def _refuse_lost_denoising(cfg: CfgNode, denoising_set: bool) -> None:
    """Raises ConfigError where denoising is asked for and would not happen; elsewhere the log says that there is none."""
    name, heads, node = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.DN_DETR.DENOISING
    if node.KNOWN_FRACTION or node.LABEL_PROMPTS:
        raise ConfigError(
            f"MODEL.DN_DETR.DENOISING.KNOWN_FRACTION or LABEL_PROMPTS is set, but MODEL.META_ARCHITECTURE = {name!r} takes "
            "neither known objects nor labels; take a config of DenoisingDETR"
        )
    chosen = heads in ROI_HEADS_REGISTRY and hasattr(ROI_HEADS_REGISTRY.get(heads), "has_denoising")
    if not node.NAME or (chosen and issubclass(META_ARCH_REGISTRY.get(name), GeneralizedRCNN)):
        return
    if chosen or denoising_set:
        raise ConfigError(
            f"MODEL.DN_DETR.DENOISING is set, but MODEL.META_ARCHITECTURE = {name!r} with MODEL.ROI_HEADS.NAME = {heads!r} "
            "trains without denoising; use GeneralizedRCNN with DenoisingROIHeads or DenoisingCascadeROIHeads, or set "
            "MODEL.DN_DETR.DENOISING.NAME ''"
        )
    logger.warning(
        "MODEL.META_ARCHITECTURE = %s with MODEL.ROI_HEADS.NAME = %s trains without denoising; DenoisingROIHeads and "
        "DenoisingCascadeROIHeads have it",
        name,
        heads,
    )
