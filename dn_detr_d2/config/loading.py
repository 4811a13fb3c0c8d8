"""One checked config from the defaults, a YAML file and overrides of the command line."""

import re
from itertools import accumulate

from detectron2.config import CfgNode, get_cfg

from ..errors import ConfigError
from .keys import add_dn_detr_config
from .ranges import flatten
from .spelling import names, nearest_key
from .validation import check_config
from .yaml_reader import read_config_file
from .zoo import find_config_file


def load_config(config_file: str = "", opts: list | None = None) -> CfgNode:
    """The defaults, over them a YAML file, over it overrides; checked by :func:`~.validation.check_config`.

    Data sets are neither registered nor read: :func:`dn_detr_d2.setup_cfg` does that too.

    Args:
        config_file: path of a YAML file, a name of the model zoo, or "" for the defaults.
        opts: [key, value, key, value, ...] that override the file.

    Raises:
        ConfigError: an unknown key (with the nearest one), or a value that cannot work.
    """
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    content = read_config_file(find_config_file(config_file)) if config_file else {}
    try:
        cfg.merge_from_other_cfg(CfgNode(_null_for_auto(content)))
        _refuse_keys_below_values(cfg, opts or [])
        cfg.merge_from_list(_as_meant(opts or []))
    except (KeyError, AssertionError, ValueError, AttributeError, TypeError, RecursionError, MemoryError) as error:
        raise ConfigError(_explain_merge(error, cfg, config_file)) from None
    check_config(cfg)
    return cfg


def device_is_named(config_file: str, opts: list) -> bool:
    """Whether the user has chosen MODEL.DEVICE, on the command line or in the file, rather than left it to the machine."""
    content = read_config_file(find_config_file(config_file)) if config_file else {}
    return "MODEL.DEVICE" in opts or "DEVICE" in (content.get("MODEL") or {})


def _null_for_auto(content: dict) -> dict:
    """A file's content with ``NUM_CLASSES: auto`` as null, in place: yacs would let no number replace a string."""
    node = (content.get("MODEL") or {}).get("DN_DETR") or {}
    if str(node.get("NUM_CLASSES")).lower() == "auto":
        node["NUM_CLASSES"] = None
    return content


def _as_meant(opts: list) -> list:
    """Overrides, with ``NUM_CLASSES auto`` as None, and with digits of a SHA-256 as text; yacs would read a number."""
    meant = list(opts)
    for i, key in enumerate(opts[:-1:2]):
        value = opts[2 * i + 1]
        if key == "MODEL.DN_DETR.NUM_CLASSES" and str(value).lower() == "auto":
            meant[2 * i + 1] = None
        elif key == "MODEL.WEIGHTS_SHA256":
            meant[2 * i + 1] = repr(str(value).strip("'\""))
    return meant


def _refuse_keys_below_values(cfg: CfgNode, opts: list) -> None:
    """yacs does not name the key of SOLVER.BASE_LR.X."""
    values = {name for name, _ in flatten(cfg)}
    for key in map(str, opts[::2]):
        for above in accumulate(key.split(".")[:-1], "{}.{}".format):
            if above in values:
                raise KeyError(f"{key} is no key, because {above} is a value and has none below it")


def _explain_merge(error: Exception, cfg: CfgNode, config_file: str) -> str:
    """yacs' complaint as one sentence, with the nearest key for a misspelt one."""
    text = str(error.args[0]) if error.args else repr(error)
    if mismatch := re.search(r"(Type mismatch \(.*?\)).*(for config key: \S+)", text, re.DOTALL):
        text = " ".join(mismatch.groups())  # without the values, which may be whole nodes
    key = text.rsplit(" ", 1)[-1]
    near = nearest_key(key, list(names(cfg))) if text.startswith("Non-existent") else None
    where = f" in {config_file} or on the command line" if config_file else " on the command line"
    hint = f"; did you mean {near}?" if near else ""
    if re.match(r"Type mismatch \(<class 'str'> vs\. <class '(int|float)'>", text):
        hint = "; put the value in quotes, that it is read as text"
    return f"{text}{where}{hint}"
