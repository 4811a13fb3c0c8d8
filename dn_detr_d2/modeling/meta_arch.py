"""The one DETR-like meta-architecture: its parts joined in one pass (see :meth:`DenoisingDETR.forward_outputs`).

Shapes: N images, D denoising queries, Q matching queries, K decoder layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ..checkpoint.model_hooks import add_loading_hooks
from ..denoising import QueryDenoising
from ..losses import HungarianMatcher, LossValue, SetCriterion, StepNormalizers, step_normalizers
from ..structures import Memory, map_by_size, to_device
from ..utils.precision import inference
from .batch import (
    count_objects,
    divisor_of,
    make_targets,
    matching_objects,
    normalised_batch,
    padded_shape,
    require_masks,
)
from .build import build_parts
from .compiling import compile_parts
from .hidden_padding import resnet_maps
from .neck import padding_mask
from .outputs import ForwardOutputs, LastPredictions
from .pixel_decoder import padded_size
from .postprocess import Postprocess, without_nms
from .prepared_weights import PreparedWeights
from .prompting import check_prompts, denoising_part, is_prompted, prompt_labels, prompted
from .training_losses import training_losses


@META_ARCH_REGISTRY.register()
class DenoisingDETR(nn.Module):
    """Every DETR-like detector of this project, from DETR to DINO, Mask2Former and Mask DINO, as Detectron2 asks for models.

    Args:
        backbone: a Detectron2 backbone.
        neck, encoder, query_source, decoder: the parts, see their modules.
        pixel_decoder: makes mask features, or None in models without masks. With it padding is a part of the image: no part
            is told of it, and boxes are relative to the padded image.
        denoising: makes denoising queries and their losses, or None to train by matching alone.
        matcher, criterion: pairs of queries and ground truths, and losses from pairs.
        postprocess: from predictions to Detectron2's output.
        pad_to_largest: at inference pad images to the largest of their batch, as the authors' evaluation does, instead of
            passing those of one size together. Then the detections of an image depend a little on its neighbours.
        hide_padding: at inference keep padding out of everything, so that the detections of an image are those that it has
            alone, whatever it is padded to; see :mod:`.hidden_padding`.
        amp: what autocast computes in at inference; None = float32. Detections are float32 in any case.
        size_divisibility: images are padded to multiples of this many pixels; 0 = what the backbone asks for.
        pixel_mean, pixel_std: of each channel, in the order of the input.
        compiled: which parts ``torch.compile`` compiles, a key of :data:`~dn_detr_d2.modeling.compiling.COMPILED`.

    Attributes:
        tensor_pass: takes images and sizes as :meth:`forward_tensors` does, such as a compiled form of it, and detects where
            no gradient is wanted and nothing is told of an image; None = the parts one by one.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        neck: nn.Module,
        encoder: nn.Module,
        query_source: nn.Module,
        decoder: nn.Module,
        pixel_decoder: nn.Module | None,
        denoising: QueryDenoising | None,
        matcher: HungarianMatcher,
        criterion: SetCriterion,
        postprocess: Postprocess,
        pad_to_largest: bool,
        hide_padding: bool,
        amp: torch.dtype | None,
        size_divisibility: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        compiled: str = "",
    ):
        super().__init__()
        self.backbone, self.neck, self.encoder = backbone, neck, encoder
        self.query_source, self.decoder, self.pixel_decoder = query_source, decoder, pixel_decoder
        self.denoising, self.matcher, self.criterion = denoising, matcher, criterion
        self._prepared = {
            name: PreparedWeights(getattr(self, name)) for name in ("backbone", "neck", "encoder", "decoder")
        }
        self.postprocess, self.amp = postprocess, amp
        self.pad_to_largest, self.hide_padding = pad_to_largest, hide_padding
        self.tensor_pass: Callable[..., tuple[Tensor, ...]] | None = None
        self.size_divisibility = divisor_of(size_divisibility, backbone)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        add_loading_hooks(self)
        compile_parts(self, compiled)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """:func:`~dn_detr_d2.modeling.build.build_parts`."""
        return build_parts(cfg)

    @property
    def device(self) -> torch.device:
        """Where the images are sent."""
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: list[dict], normalizers: StepNormalizers | None = None
    ) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Detectron2's interface.

        Args:
            batched_inputs: one dict an image: ``image`` (3, H, W) uint8 or float32 in 0..255 and the channel order of
                ``INPUT.FORMAT``; for training ``instances`` with ``gt_boxes``, ``gt_classes`` and, in models with masks,
                ``gt_masks`` (BitMasks or PolygonMasks); optionally ``height`` and ``width`` of the wanted output. Prompts
                (see :mod:`.prompting`): ``known``, Instances like these of objects that need not be found, or ``labels``,
                class numbers to be looked for, in training exactly one; in training all images of a batch have them, or
                none.
            normalizers: in training, of the step that these images are a part of; None = they are all of it.

        Returns:
            In training a dict of weighted losses: ``main/*`` of the last layer, ``aux/*_i`` of layer i, ``dn/*`` of the
            denoising part, ``proposal/*`` of two-stage systems. Otherwise one ``{"instances": Instances}`` an image; in
            models with masks what ``MODEL.DN_DETR.MASK.OUTPUTS`` names.

        Raises:
            FloatingPointError: predictions are not finite.
            DatasetError: masks are missing.
            UserError: prompts that the model cannot take.
        """
        check_prompts(self, batched_inputs)
        if self.training:
            # First, because it talks to the other processes: from here on one may fail without leaving them waiting.
            normalizers = normalizers or self.step_normalizers(batched_inputs)
            outputs = self.forward_outputs(batched_inputs, self.denoising, normalizers=normalizers)
            return {name: loss.value for name, loss in self.losses(outputs, normalizers).items()}
        if any(map(is_prompted, batched_inputs)):
            return map_by_size(self.detect, batched_inputs, together=self.passes_together)
        pending = map_by_size(self._start_detection, batched_inputs, together=self.passes_together)
        return self.postprocess.finish(pending)

    def detect(self, batched_inputs: list[dict]) -> list[dict[str, Instances]]:
        """Detections of images that pass the model together; what one is told changes nothing for the others."""
        with inference(self.device.type, self.amp):
            memory = self.encode(batched_inputs)
            queries, found = self.query_source(memory), {}
            if not all(is_prompted(x) for x in batched_inputs):  # all images, as they would pass without prompts
                found |= enumerate(self.postprocess(self.decoder(queries, memory), batched_inputs))
            found |= prompted(self, batched_inputs, memory, queries)
        return [found[i] for i in range(len(batched_inputs))]

    @contextmanager
    def without_nms(self) -> Iterator[None]:
        """Inside, the model gives every detection, whatever ``TEST.NMS`` is."""
        own, self.postprocess = self.postprocess, without_nms(self.postprocess)
        try:
            yield
        finally:
            self.postprocess = own

    def _start_detection(self, batched_inputs: list[dict]) -> list:
        """:meth:`detect` without prompts and without the last wait for the device."""
        with inference(self.device.type, self.amp):
            if self.tensor_pass is not None and not torch.is_grad_enabled():
                predictions = self._predict_by_tensors(batched_inputs)
            else:
                memory = self.encode(batched_inputs)
                predictions = self.decoder(self.query_source(memory), memory)
            return self.postprocess.start(predictions, batched_inputs)

    def _predict_by_tensors(self, batched_inputs: list[dict]) -> LastPredictions:
        """Predictions by ``tensor_pass``, from pixels that are not normalised."""
        images = self._as_batch(batched_inputs, torch.zeros_like(self.pixel_mean), torch.ones_like(self.pixel_std))
        outputs = self.tensor_pass(images.tensor, to_device(torch.tensor(images.image_sizes), self.device))
        return LastPredictions.of(dict(zip(self.tensor_names, outputs, strict=True)))

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of what :meth:`forward_tensors` gives, in its order."""
        boxes = ("boxes",) if self.decoder.BOXES else ()
        return ("logits", *boxes, *(("masks",) if self.pixel_decoder is not None else ()))

    def passes_together(self, record: dict) -> bool:
        """Whether an image passes the model with images of other sizes at inference.

        One that has fewer cells than its queries are chosen from would have more of both with hidden padding.
        """
        if not self.pad_to_largest or not self.hide_padding:
            return self.pad_to_largest
        return self.neck.count_cells(record["image"].shape[-2:]) >= getattr(self.query_source, "cells_needed", 0)

    def check_prompts(self, batched_inputs: list[dict]) -> None:
        """:func:`~dn_detr_d2.modeling.prompting.check_prompts`; :meth:`forward` does so too."""
        check_prompts(self, batched_inputs)

    def step_normalizers(self, batched_inputs: list[dict]) -> StepNormalizers:
        """What the losses of a step with these images are divided by; all processes call it together."""
        counts, denoised = count_objects(batched_inputs)
        if self.denoising is None:
            return step_normalizers(counts, 0, self.device)
        return self.denoising.normalizers(counts, self.device, denoised)

    def forward_outputs(
        self,
        batched_inputs: list[dict],
        denoising: QueryDenoising | None = None,
        *,
        annotated: bool = True,
        normalizers: StepNormalizers | None = None,
    ) -> ForwardOutputs:
        """One pass with everything that passes between the parts: what training and the diagnostics look at.

        Args:
            batched_inputs: as for :meth:`forward`; with ``instances`` where ``annotated``.
            denoising: puts denoising queries before the matching ones, in training and in evaluation mode; None = no such
                queries but those of known objects, without noise.
            annotated: whether to read the ground truth.
            normalizers: of the step that these images are a part of; None = they are all of it, on this process alone.

        Raises:
            ValueError: denoising queries are wanted of images whose ground truth is not read.
        """
        if denoising is not None and not annotated:
            raise ValueError("denoising queries are noised ground truth: with annotated=False, denoising must be None")
        if annotated and self.pixel_decoder is not None:
            require_masks(batched_inputs)
        memory = replace(self.encode(batched_inputs), losses_wanted=annotated)
        queries, targets, dn = self.query_source(memory), None, None
        if annotated:
            slots = max(normalizers.step_counts, default=1) if normalizers is not None else 1
            objects = [matching_objects(x) for x in batched_inputs]
            targets = make_targets(objects, self.device, slots, padded_size(memory))
            queries = prompt_labels(self.query_source, queries, batched_inputs)
            dn = denoising_part(self, denoising, batched_inputs, memory, targets, normalizers)
        queries = queries if dn is None else dn.join(queries)
        with self._prepared["decoder"].in_use():
            predictions = self.decoder(queries, memory)
        return ForwardOutputs(memory, targets, queries, dn, predictions)

    def encode(self, batched_inputs: list[dict]) -> Memory:
        """What the decoder looks at: preprocessing, backbone, neck, encoder and pixel decoder."""
        return self.encode_images(self.preprocess(batched_inputs))

    def encode_images(self, images: ImageList) -> Memory:
        """:meth:`encode` after the preprocessing."""
        sizes = to_device(torch.tensor(images.image_sizes), self.device)
        return self.encode_tensors(images.tensor, padding_mask(sizes, *images.tensor.shape[-2:]))

    def encode_tensors(self, images: Tensor, padding: Tensor) -> Memory:
        """:meth:`encode` of normalised images (N, 3, H, W) with their (N, H, W) bool padding mask."""
        if self.hide_padding and not self.training:
            memory = self.encoder(self.neck(resnet_maps(self.backbone, images, padding), padding, hidden=True))
            return replace(memory, hides_padding=True)
        with self._prepared["backbone"].in_use():
            features = self.backbone(images)
        if self.pixel_decoder is None:
            with self._prepared["neck"].in_use():
                pyramid = self.neck(features, padding)
            with self._prepared["encoder"].in_use():
                return self.encoder(pyramid)
        with torch.autocast(self.device.type, enabled=False):  # as in the authors' code
            features = {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in features.items()}
            return self.pixel_decoder(features, self.encoder(self.neck(features, torch.zeros_like(padding))))

    def forward_tensors(self, images: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Detection as a function of tensors, without Detectron2's dicts: what is exported. Evaluation mode.

        Args:
            images: (N, 3, H, W) floating point in 0..255 and the channel order of ``INPUT.FORMAT``. H and W must be
                multiples of ``size_divisibility``, which models with masks and some backbones ask for.
            sizes: (N, 2) integers, (height, width) of each image; what lies right of and below it is padding, whatever its
                values. None = there is no padding.

        Returns:
            tuple: what the last layer predicts: logits (N, Q, P), or (N, Q, P + 1) with "no object" last; boxes (N, Q, 4),
            cxcywh in [0, 1] of each image without its padding, of models with masks with it; mask logits
            (N, Q, H / 4, W / 4). Mask2Former has no boxes, most models have no masks.
        """
        images = (images - self.pixel_mean) / self.pixel_std
        if sizes is None:
            padding = torch.zeros_like(images[:, 0], dtype=torch.bool)
        else:
            padding = padding_mask(sizes, *images.shape[-2:])
            images = images.masked_fill(padding[:, None], 0.0)
        memory = self.encode_tensors(images, padding)
        predictions = self.decoder(self.query_source(memory), memory)
        boxes = [] if predictions.boxes is None else [predictions.boxes[-1]]
        masks = [] if predictions.mask_embeddings is None else [predictions.mask_logits()]
        return (predictions.logits[-1], *boxes, *masks)

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalised images, padded with zeros at the bottom and right; they travel to the device as they are (uint8)."""
        return self._as_batch(batched_inputs, self.pixel_mean, self.pixel_std)

    def _as_batch(self, batched_inputs: list[dict], mean: Tensor, std: Tensor) -> ImageList:
        """Images on the device, (x - mean) / std, padded with zeros."""
        images = [to_device(x["image"], self.device) for x in batched_inputs]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        shape = padded_shape(sizes, self.size_divisibility, self.backbone.padding_constraints)
        return ImageList(normalised_batch(images, mean, std, shape), sizes)

    def losses(self, outputs: ForwardOutputs, normalizers: StepNormalizers | None = None) -> dict[str, LossValue]:
        """:func:`~dn_detr_d2.modeling.training_losses.training_losses` of a pass, as :meth:`forward` names them."""
        proposal_targets = getattr(self.query_source, "proposal_targets", None)
        return training_losses(outputs, self.matcher, self.criterion, proposal_targets, normalizers)
