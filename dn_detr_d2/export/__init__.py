"""The detector as a function of tensors alone."""

from .wrapper import PARTS, OneImage

__all__ = ["PARTS", "OneImage"]
