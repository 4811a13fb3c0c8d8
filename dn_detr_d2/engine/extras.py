"""Optional packages that a training asks for: refused before it starts, not when it ends."""

from ..errors import ConfigError
from ..utils.requirements import is_installed

REPORT_PACKAGES = ("matplotlib", "supervision")


def report_is_possible() -> bool:
    """Whether what a report is made with is installed."""
    return all(map(is_installed, REPORT_PACKAGES))


def check_extras(cfg) -> None:
    """Refuses a training whose LOGGERS or REPORT need a package that is not installed.

    Raises:
        ConfigError: names the key, the package and the extra that brings it.
    """
    for name in cfg.LOGGERS:
        if not is_installed(name):  # package and extra have the same name
            raise ConfigError(
                f"LOGGERS names {name!r}, but the package is not installed; "
                f"pip install 'dn_detr_d2[{name}]', or take it out"
            )
    if cfg.REPORT == "always" and not report_is_possible():
        missing = [name for name in REPORT_PACKAGES if not is_installed(name)]
        raise ConfigError(
            f"REPORT is 'always', but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; "
            "pip install 'dn_detr_d2[report]', or set it to 'auto' or 'never'"
        )
