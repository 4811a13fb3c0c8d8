"""Query denoising without a single parameter: draw noise, lay the copies out, say who may see whom."""

from .generator import ContrastiveDenoisingGenerator, DenoisingGenerator
from .noised_targets import NoisedTargets

__all__ = ["ContrastiveDenoisingGenerator", "DenoisingGenerator", "NoisedTargets"]
