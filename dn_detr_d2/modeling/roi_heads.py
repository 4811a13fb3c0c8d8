"""Denoising for Faster R-CNN and its relatives: noised ground-truth boxes as further regions whose box must be restored.

Shapes: N images, G groups, n objects of an image, R sampled regions of the batch.
"""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from ..boxes import cxcywh_to_xyxy, image_scale, xyxy_to_cxcywh
from ..checkpoint import check_pickle
from ..denoising import ContrastiveDenoisingGenerator, DenoisingGenerator
from ..errors import ConfigError
from .registry import DENOISING_REGISTRY, lookup, name_the_node


def noised_regions(targets: list[Instances], generator: DenoisingGenerator) -> list[Instances]:
    """Noised copies of every ground-truth box, each with the object that it must be restored to.

    Args:
        targets: ``gt_boxes`` (n, 4) absolute xyxy and ``gt_classes`` (n,) of each image.
        generator: its number of groups and its box noise count; labels are not noised.

    Returns:
        list: for each image up to G * n regions, group by group: ``proposal_boxes`` absolute xyxy inside the image,
        ``gt_boxes`` and ``gt_classes``. Copies that have no area inside the image are left out.
    """
    return [_noised_regions(image, generator) for image in targets]


def _noised_regions(image: Instances, generator: DenoisingGenerator) -> Instances:
    groups, scale = generator.num_groups, image_scale(image.image_size, image.gt_boxes.tensor)
    clean = xyxy_to_cxcywh(image.gt_boxes.tensor / scale).expand(groups, -1, -1)
    boxes = Boxes((cxcywh_to_xyxy(generator.noise_boxes(clean)) * scale).flatten(0, 1))
    return _regions(image.image_size, boxes, image.gt_boxes.tensor.tile(groups, 1), image.gt_classes.tile(groups))


def _regions(image_size: tuple[int, int], boxes: Boxes, gt_boxes: Tensor, gt_classes: Tensor) -> Instances:
    """Regions clipped to their image, without those that then have no area."""
    boxes.clip(image_size)
    kept = boxes.nonempty()
    return Instances(
        image_size, proposal_boxes=boxes[kept], gt_boxes=Boxes(gt_boxes[kept]), gt_classes=gt_classes[kept]
    )


class RegionDenoising:
    """What the ROI heads with denoising share; stands before Detectron2's ROI heads in the order of inheritance.

    In training G noised copies of every object pass pooler, box head and box predictor like sampled proposals, and their
    boxes are regressed to the object that they came from, without any matching by IoU (DN-DETR, TPAMI 2024). They have no
    class loss unless it is asked for: of boxes noised with lambda = 0.4 nearly one in ten has an IoU below 0.5 with its
    object, where the sampler says background. They do not reach mask and keypoint heads, are not sampled, and do not exist
    in evaluation: RPN, the sampled proposals and their losses are those of the model without denoising.

    The sum of their losses is divided by R, the number of sampled regions, as that of the proposals is, so that
    a noised region weighs as much as a proposal in the foreground, however many objects there are.

    Args:
        generator: of the noise, or None for the model without denoising.
        denoising_weight: factor of the losses.
        denoising_classes: whether noised regions have a class loss too.
        others: of Detectron2's ROI heads.
    """

    has_denoising = True

    @configurable
    def __init__(
        self,
        *,
        generator: DenoisingGenerator | None,
        denoising_weight: float = 1.0,
        denoising_classes: bool = False,
        **others,
    ):
        super().__init__(**others)
        self.generator = generator
        self.denoising_weight, self.denoising_classes = denoising_weight, denoising_classes

    @classmethod
    def from_config(cls, cfg, input_shape) -> dict:
        """Constructor arguments from ``MODEL.ROI_HEADS`` and ``MODEL.DN_DETR.DENOISING``."""
        check_pickle(cfg.MODEL.WEIGHTS)  # the last moment before DefaultPredictor unpickles it
        if not cfg.MODEL.ROI_BOX_HEAD.NAME:
            raise ConfigError(
                f"MODEL.ROI_HEADS.NAME = {cfg.MODEL.ROI_HEADS.NAME!r} needs a MODEL.ROI_BOX_HEAD.NAME such as "
                "'FastRCNNConvFCHead', got ''; C4 models have none, take an FPN or DC5 model"
            )
        if issubclass(cls, CascadeROIHeads) and not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
            raise ConfigError(
                f"MODEL.ROI_HEADS.NAME = {cfg.MODEL.ROI_HEADS.NAME!r} needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True, "
                "as every Cascade R-CNN; set it, or use DenoisingROIHeads"
            )
        arguments = super().from_config(cfg, input_shape)
        return arguments | {
            "generator": build_generator(cfg),
            "denoising_weight": cfg.MODEL.DN_DETR.DENOISING.LOSS_WEIGHT,
            "denoising_classes": cfg.MODEL.DN_DETR.DENOISING.REGION_CLASS_LOSS,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As Detectron2's; in training the losses also hold ``dn/box_reg`` and, if asked for, ``dn/cls``."""
        regions, losses = super().forward(images, features, proposals, targets)
        if self.training and self.generator is not None:
            noised, maps = noised_regions(targets, self.generator), [features[name] for name in self.box_in_features]
            count = max(sum(len(image) for image in regions), 1)
            factor = self.denoising_weight / count
            losses |= {name: factor * loss for name, loss in self.restoration_losses(maps, noised).items()}
        return regions, losses

    def restoration_losses(self, features: list[Tensor], noised: list[Instances]) -> dict[str, Tensor]:
        """Losses of noised regions by name, each the sum over them; 0 with a gradient where there are none.

        Args:
            features: maps of the box head.
            noised: see :func:`noised_regions`.
        """
        raise NotImplementedError

    def sums(
        self, predictor: FastRCNNOutputLayers, predictions: tuple[Tensor, Tensor], regions: list[Instances]
    ) -> dict[str, Tensor]:
        """``dn/box_reg``: the box loss that ``predictor`` is configured for, with its weight; also ``dn/cls`` if asked for.

        Args:
            predictor: its box loss is a mean over regions.
            predictions: of it: scores (regions, P + 1), and deltas (regions, 4) or (regions, 4 P), of which the four of the
                object's class count.
            regions: ``proposal_boxes``, ``gt_boxes`` and ``gt_classes`` of each image.
        """
        scores, deltas = predictions
        boxes, targets = (torch.cat([x.get(name).tensor for x in regions]) for name in ("proposal_boxes", "gt_boxes"))
        classes, weights = torch.cat([image.gt_classes for image in regions]), predictor.loss_weight
        mean = predictor.box_reg_loss(boxes, targets, deltas, classes)
        losses = {"dn/box_reg": weights.get("loss_box_reg", 1.0) * max(len(classes), 1) * mean}
        if self.denoising_classes:
            if predictor.use_sigmoid_ce:
                cls = len(classes) * predictor.sigmoid_cross_entropy_loss(scores, classes)
            else:
                cls = F.cross_entropy(scores, classes, reduction="sum")
            losses["dn/cls"] = weights.get("loss_cls", 1.0) * cls
        return losses


@ROI_HEADS_REGISTRY.register()
class DenoisingROIHeads(RegionDenoising, StandardROIHeads):
    """Detectron2's StandardROIHeads (Faster R-CNN, Mask R-CNN) with :class:`RegionDenoising`."""

    def restoration_losses(self, features: list[Tensor], noised: list[Instances]) -> dict[str, Tensor]:
        """See the base class."""
        pooled = self.box_pooler(features, [image.proposal_boxes for image in noised])
        predictions = self.box_predictor(self.box_head(pooled))
        return self.sums(self.box_predictor, predictions, noised)


@ROI_HEADS_REGISTRY.register()
class DenoisingCascadeROIHeads(RegionDenoising, CascadeROIHeads):
    """Detectron2's CascadeROIHeads (Cascade R-CNN, also with masks) with :class:`RegionDenoising`.

    Noised regions go through all stages: each stage regresses what the one before has made of them, always to the object
    that they came from. Losses are ``dn/box_reg_stage0`` and so on.
    """

    def restoration_losses(self, features: list[Tensor], noised: list[Instances]) -> dict[str, Tensor]:
        """See the base class."""
        losses = {}
        for stage, predictor in enumerate(self.box_predictor):
            predictions = self._run_stage(features, noised, stage)
            losses |= {f"{name}_stage{stage}": x for name, x in self.sums(predictor, predictions, noised).items()}
            refined = predictor.predict_boxes(predictions, noised)
            noised = [
                _regions(image.image_size, Boxes(boxes.detach()), image.gt_boxes.tensor, image.gt_classes)
                for image, boxes in zip(noised, refined, strict=True)
            ]
        return losses


def build_generator(cfg) -> DenoisingGenerator | None:
    """The generator of ``MODEL.DN_DETR.DENOISING`` for regions; None where its NAME is empty.

    Raises:
        ConfigError: contrastive denoising, a limit of queries, or a value outside its range.
    """
    node = cfg.MODEL.DN_DETR.DENOISING
    if not node.NAME:
        return None
    kind = lookup(DENOISING_REGISTRY, node.NAME, "MODEL.DN_DETR.DENOISING.NAME")
    if issubclass(kind, ContrastiveDenoisingGenerator):
        raise ConfigError(
            f"MODEL.DN_DETR.DENOISING.NAME = {node.NAME!r} does not work with MODEL.ROI_HEADS.NAME = "
            f"{cfg.MODEL.ROI_HEADS.NAME!r}: its far copies need a class loss, and noised regions have none; use "
            "'DenoisingGenerator'"
        )
    if node.MAX_QUERIES:
        raise ConfigError(
            f"MODEL.DN_DETR.DENOISING.MAX_QUERIES = {node.MAX_QUERIES} does not work with MODEL.ROI_HEADS.NAME = "
            f"{cfg.MODEL.ROI_HEADS.NAME!r}, whose noised regions are no queries; set it to 0, and lower NUM_GROUPS"
        )
    with name_the_node("MODEL.DN_DETR.DENOISING"):
        return kind(**kind.from_config(cfg) | {"num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES})
