"""The one DETR-like meta-architecture: five roles joined in one sentence (see ``_queries``).

Shapes: N images, D denoising queries, Q matching queries, K decoder layers.
"""

import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer
from torch import Tensor, nn

from ..boxes import image_scale, xyxy_to_cxcywh
from ..checkpoint import BODIES, check_pickle, convert, count_classes, identify
from ..denoising import DenoisingGenerator, NoisedTargets
from ..errors import CheckpointError, ConfigError
from ..layers import MultiScaleDeformableAttention, uses_kernel
from ..structures import Memory, ObjectQueries, Predictions, Share, Targets, join_queries, to_device
from .build import build_decoder, build_denoising, build_encoder, build_query_source, name_the_node
from .criterion import SetCriterion, SoftmaxCriterion
from .matcher import HungarianMatcher, SoftmaxMatcher
from .neck import Neck, padding_mask
from .postprocess import select_best, select_top

logger = logging.getLogger(__name__)


@dataclass
class Observation:
    """What passed between the parts of the model in one pass.

    Attributes:
        memory: what the decoder looked at.
        targets: ground truth, None if it was not asked for.
        queries: as they entered the decoder, denoising queries first.
        noised: what the denoising queries stand for, None without them.
        predictions: of all layers and queries.
    """

    memory: Memory
    targets: Targets | None
    queries: ObjectQueries
    noised: NoisedTargets | None
    predictions: Predictions

    @property
    def matching(self) -> Predictions:
        """Predictions of the matching queries."""
        return self.predictions.split(self.noised.num_queries)[1] if self.noised is not None else self.predictions

    @property
    def denoising(self) -> Predictions:
        """Predictions of the denoising queries, none without a generator."""
        return self.predictions.split(self.noised.num_queries if self.noised is not None else 0)[0]


@META_ARCH_REGISTRY.register()
class DenoisingDETR(nn.Module):
    """DAB-DETR, DN-DETR, DAB- and DN-Deformable-DETR, DINO, Deformable DETR, as Detectron2's model interface asks.

    Args:
        backbone: a Detectron2 backbone.
        neck, encoder, query_source, decoder: the roles, see their modules.
        denoising: generator of noised targets, or None to train by matching alone.
        matcher, criterion: pairs of queries and ground truths, and losses from pairs.
        denoising_weight: factor of the denoising losses.
        denoising_mask: hide denoising queries; False only to show what then happens.
        local_denoising_normalizer: divide denoising losses by the objects of this rank (official DN-DETR) instead of
            the mean over all ranks.
        select: from logits, boxes, image size and ``top_k`` to detections, see ``postprocess.py``.
        top_k: detections per image.
        pad_to_largest: at inference pad images to the largest of their batch, as the authors' evaluation does, instead of
            passing those of one size together. Then the detections of an image depend a little on its neighbours.
        op_backend: what computes deformable attention, see :func:`dn_detr_d2.layers.ms_deform_attn`.
        pixel_mean, pixel_std: of each channel, in the order of the input.
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
        denoising: DenoisingGenerator | None,
        matcher: HungarianMatcher,
        criterion: SetCriterion,
        denoising_weight: float,
        denoising_mask: bool,
        local_denoising_normalizer: bool,
        select: Callable[..., Instances],
        top_k: int,
        pad_to_largest: bool,
        op_backend: str,
        pixel_mean: list[float],
        pixel_std: list[float],
    ):
        super().__init__()
        self.backbone, self.neck, self.encoder = backbone, neck, encoder
        self.query_source, self.decoder = query_source, decoder
        self.denoising, self.matcher, self.criterion = denoising, matcher, criterion
        self.denoising_weight, self.denoising_mask = denoising_weight, denoising_mask
        self.local_denoising_normalizer = local_denoising_normalizer
        self.select, self.top_k, self.pad_to_largest = select, top_k, pad_to_largest
        for module in self.modules():
            if isinstance(module, MultiScaleDeformableAttention):
                module.backend = op_backend
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.register_load_state_dict_pre_hook(_adapt_names)
        self.register_load_state_dict_post_hook(_refuse_partial_weights)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Builds the parts; raises ConfigError where keys do not go together."""
        root = cfg.MODEL.DN_DETR
        check_pickle(cfg.MODEL.WEIGHTS)  # the last moment before DefaultPredictor unpickles it
        if not isinstance(root.NUM_CLASSES, int) or root.NUM_CLASSES < 1:
            raise ConfigError(
                f"MODEL.DN_DETR.NUM_CLASSES = {root.NUM_CLASSES} must be a positive number here; 'auto' is resolved from "
                "DATASETS.TRAIN by dn_detr_d2.setup_cfg() and in the config.yaml that training writes"
            )
        if root.DENOISING.NORMALIZER not in ("global", "local"):
            raise ConfigError(
                f"MODEL.DN_DETR.DENOISING.NORMALIZER must be 'global' or 'local', got {root.DENOISING.NORMALIZER!r}"
            )
        with name_the_node("MODEL.BACKBONE / MODEL.RESNETS"):
            backbone = build_backbone(cfg)
        with name_the_node("MODEL.DN_DETR.MATCHER / LOSS"):
            softmax = root.LOSS.CLASS_LOSS == "softmax"
            matcher = SoftmaxMatcher(cfg) if softmax else HungarianMatcher(cfg)
            criterion = SoftmaxCriterion(cfg) if softmax else SetCriterion(cfg)
        neck, encoder, decoder = Neck(cfg, backbone.output_shape()), build_encoder(cfg), build_decoder(cfg)
        with name_the_node("MODEL.DN_DETR.OP_BACKEND"):
            if any(isinstance(x, MultiScaleDeformableAttention) for part in (encoder, decoder) for x in part.modules()):
                uses_kernel(root.OP_BACKEND, torch.device(cfg.MODEL.DEVICE).type)  # says which it is, or refuses
        return {
            "backbone": backbone,
            "neck": neck,
            "encoder": encoder,
            "query_source": build_query_source(cfg),
            "decoder": decoder,
            "denoising": build_denoising(cfg),
            "matcher": matcher,
            "criterion": criterion,
            "denoising_weight": root.DENOISING.LOSS_WEIGHT,
            "denoising_mask": root.DENOISING.ATTENTION_MASK,
            "local_denoising_normalizer": root.DENOISING.NORMALIZER == "local",
            "select": select_best if softmax else select_top,
            "top_k": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pad_to_largest": cfg.TEST.PAD_TO_LARGEST,
            "op_backend": root.OP_BACKEND,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        """Where the images are sent."""
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: list[dict], share: Share | None = None
    ) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Detectron2's interface.

        Args:
            batched_inputs: one dict an image: ``image`` (3, H, W) uint8 or float32 in 0..255 and the channel order of
                ``INPUT.FORMAT``; for training ``instances`` with ``gt_boxes`` and ``gt_classes``; optionally ``height``
                and ``width`` of the wanted output.
            share: in training, of the step that these images are a part of, see :meth:`share`; None = they are all of it.

        Returns:
            In training a dict of weighted losses: ``main/*`` of the last layer, ``aux/*_i`` of layer i, ``dn/*`` of the
            denoising part, ``proposal/*`` of two-stage systems. Otherwise one ``{"instances": Instances}`` an image.

        Raises:
            FloatingPointError: predictions are not finite.
        """
        if self.training:
            # First, because it talks to the other processes: from here on one may fail without leaving them waiting.
            share = share or self.share(count_objects(batched_inputs))
            return self.weighted_losses(self.observe(batched_inputs, self.denoising, whole=share.whole), share)
        found = {}
        for same in [range(len(batched_inputs))] if self.pad_to_largest else group_by_size(batched_inputs):
            found |= zip(same, self._detect([batched_inputs[i] for i in same]), strict=True)
        return [found[i] for i in range(len(batched_inputs))]

    def share(self, whole: list[int]) -> Share:
        """What the losses of a step are divided by; all processes call it together.

        Args:
            whole: objects of each image of this process in this step.
        """
        return self._share(whole, self.denoising.num_pairs(whole) if self.denoising is not None else 0)

    def _share(self, whole: list[int], copies: int) -> Share:
        objects, mean = mean_over_ranks([sum(whole), copies], self.device)
        if self.local_denoising_normalizer:
            mean = torch.full((), max(copies, 1.0), device=self.device)
        return Share(whole, objects, mean)

    def observe(
        self,
        batched_inputs: list[dict],
        denoising: DenoisingGenerator | None = None,
        *,
        annotated: bool = True,
        whole: list[int] | None = None,
    ) -> Observation:
        """One pass with everything that passes between the parts: what training and the instruments look at.

        Args:
            batched_inputs: as for :meth:`forward`; with ``instances`` where ``annotated``.
            denoising: puts denoising queries before the matching ones, in training and in evaluation mode; None = no such
                queries.
            annotated: whether to read the ground truth.
            whole: of :class:`~dn_detr_d2.structures.Targets`.

        Raises:
            ValueError: denoising queries are wanted of images whose ground truth is not read.
        """
        if denoising is not None and not annotated:
            raise ValueError("denoising queries are noised ground truth: with annotated=False, denoising must be None")
        memory = self.encoder(self._pyramid(self._preprocess(batched_inputs)))
        targets = self._targets([x["instances"] for x in batched_inputs], whole) if annotated else None
        queries, noised = self._queries(memory, targets, denoising)
        return Observation(memory, targets, queries, noised, self.decoder(queries, memory))

    def _queries(
        self, memory: Memory, targets: Targets | None = None, denoising: DenoisingGenerator | None = None
    ) -> tuple[ObjectQueries, NoisedTargets | None]:
        """With targets and a generator, denoising queries stand before the matching ones."""
        queries, noised = self.query_source(memory), None
        if targets is not None and denoising is not None:
            noised = denoising(targets)
            blocked = noised.attention_mask(queries.content.shape[1]) if self.denoising_mask else None
            queries = join_queries(self.query_source.embed(noised), queries, blocked)
        return queries, noised

    def _preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalises each image, then pads with zeros at the bottom and right."""
        images = [to_device(x["image"], self.device) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        return ImageList.from_tensors(
            images, self.backbone.size_divisibility, padding_constraints=self.backbone.padding_constraints
        )

    def _pyramid(self, images: ImageList):
        features = self.backbone(images.tensor)
        padding = padding_mask(images.image_sizes, *images.tensor.shape[-2:], device=self.device)
        return self.neck(features, padding)

    def _targets(self, instances: list[Instances], whole: list[int] | None = None) -> Targets:
        """Absolute xyxy of each augmented image -> padded relative cxcywh."""
        boxes = []
        for image in instances:
            absolute = image.gt_boxes.tensor.float()
            boxes.append(xyxy_to_cxcywh(absolute / image_scale(image.image_size, absolute)))
        return Targets.pad([image.gt_classes for image in instances], boxes, self.device, whole)

    def weighted_losses(self, seen: Observation, share: Share | None = None) -> dict[str, Tensor]:
        """All loss terms of an annotated pass, as :meth:`forward` names them.

        Args:
            seen: of :meth:`observe`.
            share: what sums over objects are divided by, see :meth:`share`; None = what these images alone give.
        """
        predictions, proposals = seen.predictions, seen.queries.proposals
        noised, targets = seen.noised, seen.targets
        share = share or self._share(targets.whole, len(noised.assignment) if noised is not None else 0)
        losses = {}
        if noised is not None:
            denoising, predictions = predictions.split(noised.num_queries)
            terms = self.criterion(denoising, targets, noised.assignment, share.copies, counted=noised.counted)
            losses = name_layers({k: self.denoising_weight * v for k, v in terms.items()}, "dn", "dn")
        if proposals is not None:
            wanted = self.query_source.proposal_targets(targets)
            assignment = self.matcher(proposals, wanted)
            losses |= name_layers(self.criterion(proposals, wanted, assignment, share.objects), "proposal", "proposal")
        assignment = self.matcher(predictions, targets)
        return name_layers(self.criterion(predictions, targets, assignment, share.objects), "main", "aux") | losses

    def _detect(self, batched_inputs: list[dict]) -> list[dict[str, Instances]]:
        """One pass for all, each padded to the largest."""
        predictions = self.observe(batched_inputs, annotated=False).predictions
        return self._detections(predictions, [tuple(x["image"].shape[-2:]) for x in batched_inputs], batched_inputs)

    def _detections(self, predictions: Predictions, image_sizes, batched_inputs) -> list[dict[str, Instances]]:
        logits, boxes = predictions.logits[-1], predictions.boxes[-1]
        if not torch.stack([logits.isfinite().all(), boxes.isfinite().all()]).all():  # one wait for the device
            raise FloatingPointError(
                "the model predicts NaN or Inf: its weights or its input are not finite "
                f"(files: {[x.get('file_name', 'unnamed') for x in batched_inputs]})"
            )
        found = []
        for *image, x, size in zip(logits, boxes, batched_inputs, image_sizes, strict=True):
            result = self.select(*image, size, self.top_k)
            found.append({"instances": detector_postprocess(result, x.get("height", size[0]), x.get("width", size[1]))})
        return found


def count_objects(batched_inputs: list[dict]) -> list[int]:
    """Objects of each image."""
    return [len(x["instances"]) for x in batched_inputs]


def group_by_size(batched_inputs: list[dict]) -> list[list[int]]:
    """Indices of the images of each size, so that none has to be padded for another."""
    groups = {}
    for i, image in enumerate(batched_inputs):
        groups.setdefault(image["image"].shape, []).append(i)
    return list(groups.values())


def mean_over_ranks(counts: list[int], device: torch.device) -> Tensor:
    """(n,) means of n counts over the processes, each at least 1; never read back to the host."""
    total = torch.stack([torch.full((), float(count), device=device) for count in counts])
    if comm.get_world_size() > 1:
        dist.all_reduce(total)
    return (total / comm.get_world_size()).clamp(min=1)


def name_layers(terms: dict[str, Tensor], last: str, others: str) -> dict[str, Tensor]:
    """Splits (K,) losses into scalars: ``last/term`` for the last layer, ``others/term_i`` for the layers before."""
    named = {f"{last}/{term}": values[-1] for term, values in terms.items()}
    for term, values in terms.items():
        named |= {f"{others}/{term}_{i}": value for i, value in enumerate(values[:-1])}
    return named


def _adapt_names(model: nn.Module, state: dict, prefix: str, *_) -> None:
    """Converts a whole state dict of another code, whoever loads it: Detectron2's DefaultPredictor has no other door.

    What cannot be converted stays as it is, so that ``load_state_dict`` says what is missing and what is unexpected, as it
    does for every module; in Detectron2's checkpointer it is refused, see :func:`_read_by_detectron2`.
    """
    own = model.state_dict()
    source = identify(state)
    if prefix or source is None or source.code == "this project" or all(name in own for name in state):
        return
    try:
        conversion = convert(state, own)
        if conversion.new_classes:
            raise CheckpointError(
                f"the checkpoint ({source}) lacks {len(conversion.new_classes)} of the model's classes; set "
                "MODEL.DN_DETR.NUM_CLASSES to its number, or train the model from it with train_net.py"
            )
    except CheckpointError:
        if _read_by_detectron2():
            raise
        return
    for sentence in conversion.log:
        logger.info(sentence)
    state.clear()
    state.update(conversion.state)


def _read_by_detectron2() -> bool:
    """Whether a checkpointer that only warns of missing weights is at work, which is how DefaultPredictor loads.

    Completeness is a matter of who reads a file, not of the model: our own checkpointer and a user's ``load_state_dict``
    see to it themselves. Detectron2's cannot be told to, and calls nothing but the model; so the model looks for it among
    its callers.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not FvcoreCheckpointer._load_model.__code__:
        frame = frame.f_back
    return frame is not None and not getattr(frame.f_locals["self"], "refuses_partial_weights", False)


def _refuse_partial_weights(model: nn.Module, incompatible) -> None:
    """Raises CheckpointError when Detectron2's checkpointer leaves a part of the model at random.

    For training, a backbone alone is a fine start. A checkpoint whose class head was left out because its shape differs
    is not, nor is one that fits nowhere. For inference (``model.eval()`` before loading, as DefaultPredictor does)
    everything must be there.
    """
    everything = {name for name, _ in model.named_parameters()}
    missing = everything & set(incompatible.missing_keys)
    if not missing or not _read_by_detectron2():
        return
    ours = {name for name in missing if not name.startswith("backbone.")}
    backbone_only = ours == {name for name in everything if not name.startswith("backbone.")}
    pyramid = {
        name for name in everything if re.match(r"backbone\.(?!bottom_up\.|net\.)", name)
    }  # around a body, or all
    fresh = pyramid if any(name.startswith(BODIES) for name in everything) else set()
    if model.training and backbone_only and missing - ours <= fresh:
        return
    shown = ", ".join(sorted(ours or missing)[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    classes = count_classes(model.state_dict())  # None with a decoder of somebody else
    raise CheckpointError(
        f"the checkpoint does not fit the model: {shown} are missing or have another shape; "
        + (f"the model has MODEL.DN_DETR.NUM_CLASSES = {classes}, so " if classes else "")
        + "compare it and the other MODEL keys with the config.yaml that the checkpoint was trained with"
    )
