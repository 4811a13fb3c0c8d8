"""Hugging Face's DAB-DETR, and the same with denoising: DN-DETR.

    pip install transformers
    python examples/dab_detr_transformers.py --iterations 2000 --seed 1 [--no-denoising]

The model is made from a config, nothing is downloaded. ``from_pretrained`` of the class below takes published weights of
DAB-DETR, too.
"""

import torch
from shapes_training import CLASSES, run
from torch import Tensor
from transformers import DabDetrConfig, DabDetrForObjectDetection, ResNetConfig
from transformers.models.dab_detr.modeling_dab_detr import DabDetrDecoder, DabDetrDecoderOutput, inverse_sigmoid

from dn_detr_d2 import DenoisingGenerator, QueryDenoising, SetCriterion, check_isolation


class DenoisingDabDetrForObjectDetection(DabDetrForObjectDetection):
    """DAB-DETR, trained with denoising. Its code is used as it is: hooks put queries into its decoder and take them out.

    The contents of its own queries are 0, so the last channel can say which queries are denoising queries, as in the paper.
    """

    def __init__(self, config: DabDetrConfig):
        super().__init__(config)
        self._init_weights(
            self
        )  # transformers leaves this out for classes from elsewhere: box head and bias of class head
        criterion = SetCriterion(
            class_weight=config.cls_loss_coefficient,
            l1_weight=config.bbox_loss_coefficient,
            giou_weight=config.giou_loss_coefficient,
        )
        generator = DenoisingGenerator(num_classes=config.num_labels)
        self.denoising = QueryDenoising(generator, dim=config.hidden_size, criterion=criterion)
        self.dn = self.dn_outputs = self.bias = None
        decoder = self.model.decoder
        decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        decoder.register_forward_hook(self._after_decoder)
        for layer in decoder.layers:  # (hidden states, attention mask, ...)
            layer.register_forward_pre_hook(lambda _, args: (args[0], self.bias, *args[2:]))

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, labels: list[dict] | None = None, **options
    ):
        """As DabDetrForObjectDetection's; in training with denoising losses in ``loss`` and ``loss_dict``."""
        targets = [{"labels": x["class_labels"], "boxes": x["boxes"]} for x in labels] if labels else None
        self.dn = self.denoising(targets)
        outputs = super().forward(pixel_values, pixel_mask, labels=labels, **options)
        if losses := self.dn.losses(self.dn_outputs):
            outputs.loss_dict |= losses
            outputs.loss = outputs.loss + sum(losses.values())
        return outputs

    def _before_decoder(self, decoder: DabDetrDecoder, args: tuple, given: dict) -> tuple[tuple, dict]:
        """Denoising queries come first; anchors are passed as logits."""
        anchors = given["query_position_embeddings"]
        content, boxes, mask = self.dn.prepend(given["inputs_embeds"], anchors.sigmoid())
        self._hide(mask)
        anchors = torch.cat([inverse_sigmoid(boxes[:, : self.dn.num_queries]), anchors], 1)
        return args, given | {"inputs_embeds": content, "query_position_embeddings": anchors}

    def _hide(self, mask: Tensor | None) -> None:
        """The mask as DAB-DETR's attention takes it: numbers to add."""
        self.bias = None if mask is None else torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -torch.inf)

    def _after_decoder(self, decoder: DabDetrDecoder, args: tuple, output: DabDetrDecoderOutput) -> None:
        """The rest of the model sees its own queries only."""
        outputs, d = self._heads(output), self.dn.num_queries
        _, self.dn_outputs = self.dn.split(outputs)
        for name, axis in (("last_hidden_state", 1), ("intermediate_hidden_states", 2), ("reference_points", 2)):
            output[name] = output[name].narrow(axis, d, output[name].shape[axis] - d)

    def _heads(self, output: DabDetrDecoderOutput) -> tuple[Tensor, Tensor]:
        """Logits (K, N, D + Q, P) and boxes (K, N, D + Q, 4)."""
        hidden = output.intermediate_hidden_states
        boxes = self.bbox_predictor(hidden) + inverse_sigmoid(output.reference_points)
        return self.class_embed(hidden), boxes.sigmoid()

    @torch.no_grad()
    def check(self, pixel_values: Tensor, labels: list[dict]) -> int:
        """Raises LeakError if a query sees a denoising query that it must not see."""
        seen = {}
        hook = self.model.decoder.register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
        self.eval()  # without dropout
        self.denoising.train()
        self(pixel_values, labels=labels)
        hook.remove()

        def decode(content: Tensor, boxes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            self._hide(mask)
            given = seen | {"inputs_embeds": content, "query_position_embeddings": inverse_sigmoid(boxes)}
            return self._heads(self.model.decoder.forward(**given))  # past the hooks of the decoder

        return check_isolation(decode, self.dn)


def make(denoising: bool) -> DabDetrForObjectDetection:
    """A detector of the shapes, small enough for a CPU."""
    backbone = ResNetConfig(
        embedding_size=48, hidden_sizes=[48, 96], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {
        "hidden_size": 128,
        "encoder_ffn_dim": 256,
        "decoder_ffn_dim": 256,
        "encoder_layers": 1,
        "decoder_layers": 3,
    }
    heads = {"num_labels": len(CLASSES), "num_queries": 30, "auxiliary_loss": True}
    config = DabDetrConfig(backbone_config=backbone, dropout=0.0, **sizes, **heads)
    model = (DenoisingDabDetrForObjectDetection if denoising else DabDetrForObjectDetection)(config)
    generator = torch.Generator().manual_seed(torch.initial_seed())  # the same with and without denoising
    torch.nn.init.normal_(model.model.query_refpoint_embeddings.weight, generator=generator)  # all over the image
    return model


def as_labels(targets: list[dict]) -> list[dict]:
    """DETR's targets as transformers names them."""
    return [{"class_labels": x["labels"], "boxes": x["boxes"]} for x in targets]


def losses(model: DabDetrForObjectDetection, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
    """The weighted sum of all matching losses, and denoising losses one by one."""
    outputs = model(images, labels=as_labels(targets))
    dn = {name: value for name, value in outputs.loss_dict.items() if name.startswith("dn/")}
    return {"matching": outputs.loss - sum(dn.values()), **dn}


def predict(model: DabDetrForObjectDetection, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class probabilities (N, Q, P) and boxes (N, Q, 4)."""
    outputs = model(images)
    return outputs.logits.sigmoid(), outputs.pred_boxes


def check(model: DenoisingDabDetrForObjectDetection, images: Tensor, targets: list[dict]) -> int:
    """See DenoisingDabDetrForObjectDetection.check."""
    return model.check(images, as_labels(targets))


if __name__ == "__main__":
    run(make, losses, predict, check, "DAB-DETR of transformers")
