"""A detector as a module whose ``forward`` takes and gives tensors: what tracers and exporters ask for."""

from torch import Tensor, nn

PARTS = ("backbone", "neck", "encoder", "pixel_decoder", "query_source", "decoder")


class TensorModel(nn.Module):
    """:meth:`~dn_detr_d2.modeling.DenoisingDETR.forward_tensors` of a model as a module of its own.

    Args:
        model: a :class:`~dn_detr_d2.modeling.DenoisingDETR`, shared and not copied; its parts are ``model.backbone`` and so
            on, see :data:`PARTS`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """(N, 3, H, W) in 0..255, (N, 2) sizes or None -> logits, boxes and masks, as far as there are any."""
        return self.model.forward_tensors(images, sizes)
