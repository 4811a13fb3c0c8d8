"""Noise by name: what a config or a constructor calls it, and the function behind it."""

from collections.abc import Callable

from ..errors import ConfigError


class NoiseRegistry:
    """Functions that draw noise, by name. A class stands for its instances, which are the functions.

    Args:
        argument: of :class:`~dn_detr_d2.DenoisingGenerator`, for messages.
        key: of the config, for messages.
    """

    def __init__(self, argument: str, key: str):
        self.argument, self.key = argument, key
        self._noises: dict[str, Callable] = {}

    def register(self, name: str) -> Callable:
        """A decorator that makes a function, or a class of functions, known as ``name``; ValueError if there is one."""

        def keep(noise: Callable) -> Callable:
            """Keeps the function under the name."""
            if name in self._noises:
                raise ValueError(f"{self.argument} {name!r} is registered already; choose another name")
            self._noises[name] = noise
            return noise

        return keep

    def resolve(self, noise: str | Callable) -> Callable:
        """The function called ``noise``; a function is returned as it is. Raises ValueError for an unknown name."""
        if callable(noise):
            return noise
        if not isinstance(noise, str) or noise not in self._noises:
            raise ValueError(
                f"{self.argument} = {noise!r} is not known; give a function or choose one of: {self._choices()}"
            )
        found = self._noises[noise]
        return found() if isinstance(found, type) else found

    def from_config(self, name: str, cfg) -> Callable:
        """The function called ``name``; of a class its ``from_config(cfg)``. Raises ConfigError for an unknown name."""
        if name not in self._noises:
            raise ConfigError(f"{self.key} = {name!r} is not known; choose one of: {self._choices()}")
        found = self._noises[name]
        return found.from_config(cfg) if hasattr(found, "from_config") else self.resolve(name)

    def _choices(self) -> str:
        return ", ".join(sorted(self._noises))
