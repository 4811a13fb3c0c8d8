"""What passes between the parts of a detector in one pass, for losses and for diagnostics."""

from dataclasses import dataclass

from torch import Tensor

from ..denoising import DenoisingQueries, NoisedTargets
from ..structures import Memory, ObjectQueries, Predictions, Targets


@dataclass
class ForwardOutputs:
    """One pass of a :class:`~dn_detr_d2.modeling.DenoisingDETR`.

    Attributes:
        memory: what the decoder looked at.
        targets: ground truth, None if it was not asked for.
        queries: as they entered the decoder, denoising queries first.
        dn: the denoising queries, None without.
        predictions: of all layers and queries.
    """

    memory: Memory
    targets: Targets | None
    queries: ObjectQueries
    dn: DenoisingQueries | None
    predictions: Predictions

    @property
    def noised(self) -> NoisedTargets | None:
        """What the denoising queries stand for, None without them."""
        return self.dn.noised if self.dn is not None else None

    @property
    def denoised(self) -> Targets | None:
        """What the denoising queries restore, None without them."""
        return self.dn.targets if self.dn is not None else None

    @property
    def matching(self) -> Predictions:
        """Predictions of the matching queries."""
        return self._parts[1]

    @property
    def denoising(self) -> Predictions:
        """Predictions of the denoising queries, none without a generator."""
        return self._parts[0]

    @property
    def _parts(self) -> tuple[Predictions, Predictions]:
        return self.predictions.split(self.dn.num_queries if self.dn is not None else 0)


@dataclass
class LastPredictions(Predictions):
    """Predictions of the last layer alone, with masks as maps.

    Attributes:
        maps: (N, Q, h, w) mask logits, or None.
    """

    maps: Tensor | None = None

    @classmethod
    def of(cls, outputs: dict[str, Tensor]) -> "LastPredictions":
        """From what :meth:`~.meta_arch.DenoisingDETR.forward_tensors` gives, as "logits", "boxes" and "masks"."""
        boxes = outputs["boxes"][None] if "boxes" in outputs else None
        return cls(outputs["logits"][None], boxes, maps=outputs.get("masks"))

    def mask_logits(self, row: int = -1) -> Tensor:
        """The maps."""
        return self.maps
