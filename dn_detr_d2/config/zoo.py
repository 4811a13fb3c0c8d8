"""The YAML files that come with the package, by name."""

from difflib import get_close_matches
from pathlib import Path

from ..errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent.parent


def config_folder() -> Path:
    """The folder of the YAML files: inside the package where it was installed, beside it in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def config_names() -> list[str]:
    """All names without suffix, sorted."""
    return sorted(path.stem for path in config_folder().glob("*.yaml"))


def similar_names(name: str) -> list[str]:
    """The names that are spelled most like a wrong one, with or without ``.yaml``; at most three."""
    return get_close_matches(name.removesuffix(".yaml"), config_names(), n=3)


def get_config_file(name: str) -> str:
    """Path of a YAML file that comes with the package.

    Args:
        name: such as ``dn_detr_R50_50ep``, also with ``.yaml``.

    Raises:
        ConfigError: there is none of this name; the sentence has the nearest names.
    """
    known = config_names()
    stem = name.removesuffix(".yaml")
    if stem in known:
        return str(config_folder() / f"{stem}.yaml")
    near = similar_names(name)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {len(known)} in {config_folder()}"
    raise ConfigError(f"{name!r} is no config of the model zoo; {hint}")


def find_config_file(path: str | Path) -> str:
    """``path``, or the file of the model zoo if it is a bare name of one and no file of this machine."""
    path = str(path)
    if Path(path).is_file() or path.removesuffix(".yaml") not in config_names():
        return path
    return get_config_file(path)
