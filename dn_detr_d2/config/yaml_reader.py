"""Reading YAML config files and their bases without executing, downloading or expanding what is inside.

Detectron2's own reader executes ``!!python`` tags and fetches a ``_BASE_`` from the web; a config here is plain values from
files of this machine.
"""

from pathlib import Path

import yaml

from ..errors import ConfigError
from .zoo import config_names, get_config_file, similar_names

BASE = "_BASE_"
MAX_BYTES = 256 * 1024  # bytes; the longest config.yaml of a training has 15 thousand
MAX_VALUES = 50_000  # once every alias is written out; a config.yaml has 500


def read_config_file(config_file: str) -> dict:
    """The content of a YAML file over that of the files it names as ``_BASE_``, which are relative to it.

    As for ``--config-file``, a bare name that is no file there is one of the model zoo.

    Raises:
        ConfigError: a file that is not there, is not YAML, is larger than any config, asks for Python objects, or is its
            own base.
    """
    return _read(Path(config_file), ())


def _read(path: Path, above: tuple[Path, ...]) -> dict:
    if path.resolve() in above:
        raise ConfigError(f"config file {path} is its own {BASE}; take the line out")
    content = _parse(path)
    bases = content.pop(BASE, [])
    merged = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or "://" in base:
            raise ConfigError(f"config file {path}: {BASE} names files of this machine, got {_short(base)}")
        _merge(_read(_find(base, path), (*above, path.resolve())), merged, path)
    _merge(content, merged, path)
    return merged


def _find(base: str, path: Path) -> Path:
    """The file that ``path`` names as its base."""
    beside = path.parent / Path(base).expanduser()
    from_zoo = not beside.exists() and base.removesuffix(".yaml") in config_names()
    return Path(get_config_file(base)) if from_zoo else beside


def _parse(path: Path) -> dict:
    """The content of one file; its nodes are checked before any value is built."""
    if path.suffix == ".py":
        raise ConfigError(f"config file {path} is Python code, which is not executed; give a .yaml file")
    if not path.is_file():
        near = similar_names(str(path))
        hint = f"; the model zoo has {', '.join(near)}" if near else ""
        raise ConfigError(f"config file {str(path)!r} does not exist (looked in {Path.cwd()}){hint}")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"config file {path} has {path.stat().st_size} bytes, a config has at most {MAX_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
        _check_nodes(yaml.compose(text, yaml.SafeLoader), path)
        content = yaml.safe_load(text)
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"config file {path} is nested too deeply, or contains itself") from None
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"config file {path} cannot be read: {' '.join(str(error).split())[:300]}") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"config file {path} must hold KEY: value lines, got {_short(content)}")
    return content or {}


def _check_nodes(root: yaml.Node | None, path: Path) -> None:
    """Refuses tags of Python objects, and aliases that expand to more values than any config has."""
    sizes = {}

    def _count(node: yaml.Node) -> int:
        if "python/" in node.tag:
            line = node.start_mark.line + 1
            raise ConfigError(
                f"config file {path}, line {line}: the tag {_short(node.tag)} asks for a Python object, and nothing was "
                "executed; write a plain value"
            )
        if id(node) not in sizes:
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
            sizes[id(node)] = 1 + sum(map(_count, parts))
        return sizes[id(node)]

    if root is not None and _count(root) > MAX_VALUES:
        raise ConfigError(f"config file {path} unfolds to more than {MAX_VALUES} values; write fewer aliases")


def _merge(new: dict, old: dict, path: Path) -> None:
    """Writes ``new`` over ``old``, node by node."""
    for key, value in new.items():
        if isinstance(value, dict) and key in old:
            if not isinstance(old[key], dict):
                raise ConfigError(f"config file {path}: {_short(key)} holds keys, but is a value in its {BASE}")
            _merge(value, old[key], path)
        else:
            old[key] = value


def _short(value) -> str:
    """A value for an error message."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."
