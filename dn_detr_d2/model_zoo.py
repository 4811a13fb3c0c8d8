"""The configs that come with this package, by name, as ``detectron2.model_zoo`` has them for its own.

    cfg = dn_detr_d2.model_zoo.get_config("dn_detr_R50_50ep")

MODEL_ZOO.md lists them with their results. No weights are published for them.
"""

from detectron2.config import CfgNode

from .config.zoo import config_names, get_config_file
from .engine.setup import setup_cfg

__all__ = ["config_names", "get_config", "get_config_file"]


def get_config(name: str, opts: list | None = None, *, splits: tuple[str, ...] = ("TRAIN", "TEST")) -> CfgNode:
    """A complete config of the model zoo.

    Args:
        name: such as ``dn_detr_R50_50ep``, also with ``.yaml``.
        opts, splits: as for :func:`dn_detr_d2.setup_cfg`.

    Raises:
        ConfigError: there is none of this name, or as :func:`dn_detr_d2.setup_cfg`.
        DatasetError: as :func:`dn_detr_d2.setup_cfg`.
    """
    return setup_cfg(get_config_file(name), opts, splits=splits)
