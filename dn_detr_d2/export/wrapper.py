"""A detector without everything around it: from one normalised image to the predictions of the last layer."""

import torch
from torch import Tensor, nn

PARTS = ("backbone", "neck", "encoder", "pixel_decoder", "query_source", "decoder")


class OneImage(nn.Module):
    """The detector from a normalised image to logits, boxes and masks, so that each part keeps its name.

    Args:
        model: a :class:`~dn_detr_d2.modeling.DenoisingDETR`, whose parts are shared and not copied.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        for name in PARTS:
            setattr(self, name, getattr(model, name))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(1, 3, H, W) -> what there is of the last layer.

        Returns:
            tuple: logits (1, Q, P), boxes (1, Q, 4), cxcywh in [0, 1], and mask logits (1, Q, H / 4, W / 4), where H and W
            must be multiples of the model's ``size_divisibility``. Mask2Former has no boxes, most models have no masks.
        """
        padding = torch.zeros(1, *image.shape[-2:], dtype=torch.bool)
        features = self.backbone(image)
        memory = self.encoder(self.neck(features, padding))
        if self.pixel_decoder is not None:
            memory = self.pixel_decoder(features, memory)
        predictions = self.decoder(self.query_source(memory), memory)
        boxes = [] if predictions.boxes is None else [predictions.boxes[-1]]
        masks = [] if predictions.mask_embeddings is None else [predictions.mask_logits()]
        return (predictions.logits[-1], *boxes, *masks)
