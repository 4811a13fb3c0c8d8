"""From noised labels and boxes to queries.

Shapes: N images, D denoising queries, C channels, P classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..boxes import LOGIT_EPS, logit
from ..structures import ObjectQueries
from .noised_targets import NoisedTargets


class LabelEncoder(nn.Module):
    """Label embedding with indicator (DN-DETR Sec. 4.3): [embedding of the label ‖ 1 if the query denoises, else 0].

    Args:
        num_classes: P; row P of the table is "unknown", the content of DN-DETR's matching queries.
        dim: C; the table has C - 1 columns beside the indicator.
        indicator: DINO has none; then the table has C columns.
        unknown: whether the table has the row "unknown"; Mask DINO's has not.
    """

    def __init__(self, num_classes: int, dim: int, indicator: bool = True, unknown: bool = True):
        super().__init__()
        self.embed = nn.Embedding(num_classes + unknown, dim - indicator)
        self.indicator = int(indicator)

    @property
    def dim(self) -> int:
        """C, indicator included."""
        return self.embed.embedding_dim + self.indicator

    def forward(self, noised: NoisedTargets) -> Tensor:
        """(N, D, C) content of the denoising queries; zeros where padded, whose label is "unknown"."""
        labels = noised.labels.clamp(max=self.embed.num_embeddings - 1)
        return self.prompt(labels) * noised.valid[..., None]

    def prompt(self, labels: Tensor) -> Tensor:
        """(...) labels -> (..., C) content of a matching query that looks for objects of its label; indicator 1."""
        return F.pad(self.embed(labels), (0, self.indicator), value=1.0)

    def unknown(self) -> Tensor:
        """(C,) content of a query that has no label."""
        return F.pad(self.embed.weight[-1], (0, self.indicator))


def embed_boxes(label_encoder: LabelEncoder, noised: NoisedTargets, logit_eps: float = LOGIT_EPS) -> ObjectQueries:
    """Labels become contents. Boxes pass through the clamped logit as anchors do, so none has a side of 0.

    Args:
        label_encoder: of the model.
        noised: labels and boxes.
        logit_eps: clamp of the logit.
    """
    return ObjectQueries(label_encoder(noised), logit(noised.boxes, logit_eps).sigmoid())
