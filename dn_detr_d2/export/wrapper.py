"""A detector without everything around it: from one normalised image to the predictions of the last layer."""

import torch
from torch import Tensor, nn

PARTS = ("backbone", "neck", "encoder", "query_source", "decoder")


class OneImage(nn.Module):
    """The detector from a normalised image to logits and boxes, so that each part keeps its name.

    Args:
        model: a :class:`~dn_detr_d2.modeling.DenoisingDETR`, whose parts are shared and not copied.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        for name in PARTS:
            setattr(self, name, getattr(model, name))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(1, 3, H, W) -> logits (1, Q, P) and boxes (1, Q, 4), cxcywh in [0, 1], of the last layer."""
        padding = torch.zeros(1, *image.shape[-2:], dtype=torch.bool)
        memory = self.encoder(self.neck(self.backbone(image), padding))
        predictions = self.decoder(self.query_source(memory), memory)
        return predictions.logits[-1], predictions.boxes[-1]
