"""What a detector is told of an image beforehand: known objects, or labels (DN-DETR, TPAMI 2024, "other applications").

Known objects (``known`` in the dict of an image) are the denoising part as an input: the matching queries see them and find
the other objects. Labels (``labels``) are looked for one by one: in the pass of a label all matching queries have its
embedding as content. The encoder runs once in either case.

Shapes: N images, L passes, Q matching queries.
"""

from typing import TYPE_CHECKING

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from ..boxes import image_scale
from ..denoising import DenoisingQueries, QueryDenoising
from ..denoising.targets import ROUNDING
from ..errors import ConfigError, UserError
from ..losses import StepNormalizers
from ..structures import Memory, ObjectQueries, Targets, take_images
from .batch import denoised_objects, make_targets
from .pixel_decoder import padded_size

if TYPE_CHECKING:
    from .meta_arch import DenoisingDETR

KNOWN, LABELS = "known", "labels"


def is_prompted(record: dict) -> bool:
    """Whether the detections of an image are to be found by prompts: known objects if there are any, or a list of labels."""
    return bool(len(record.get(KNOWN, ()))) or LABELS in record


def check_prompt_keys(cfg, query_source: nn.Module, denoising: QueryDenoising | None) -> None:
    """Refuses prompts that the model of a config cannot take; raises ConfigError."""
    node = cfg.MODEL.DN_DETR.DENOISING
    if not node.KNOWN_FRACTION and not node.LABEL_PROMPTS:
        return
    if node.KNOWN_FRACTION and node.LABEL_PROMPTS:
        raise ConfigError(
            f"MODEL.DN_DETR.DENOISING.KNOWN_FRACTION = {node.KNOWN_FRACTION} and LABEL_PROMPTS = True are two ways to "
            "train; choose one"
        )
    _require_part(query_source, denoising, LABELS if node.LABEL_PROMPTS else KNOWN, cfg.MODEL.DN_DETR.MASK.ENABLED)
    if node.KNOWN_FRACTION and node.NUM_GROUPS != 1:
        raise ConfigError(
            f"MODEL.DN_DETR.DENOISING.KNOWN_FRACTION = {node.KNOWN_FRACTION} needs NUM_GROUPS 1, got {node.NUM_GROUPS}: "
            "further groups would only tell the same objects again"
        )
    if node.KNOWN_FRACTION and denoising.generator.layout(3)[0] != 1:
        raise ConfigError(
            f"MODEL.DN_DETR.DENOISING.KNOWN_FRACTION = {node.KNOWN_FRACTION} needs one group, but DENOISING.NAME "
            f"{node.NAME!r} makes as many as DENOISING.NUM_QUERIES = {node.NUM_QUERIES} allows; set that to 0, or take "
            "DenoisingGenerator"
        )


def _require_part(query_source: nn.Module, denoising: QueryDenoising | None, kind: str, masks: bool) -> None:
    """Raises ConfigError where the parts of a model, perhaps with masks, cannot take prompts of a kind."""
    name = type(query_source).__name__
    if masks and kind == LABELS:
        raise ConfigError(
            f"{kind!r} are not looked for by models with masks (MODEL.DN_DETR.MASK.ENABLED True); take a model of boxes"
        )
    if denoising is None:
        raise ConfigError(
            f"{kind!r} need the label embedding that denoising trains, but MODEL.DN_DETR.DENOISING.NAME is ''; take a "
            "model that was trained with denoising"
        )
    if denoising.generator.COPIES > 1 or not hasattr(query_source, "prompt"):
        raise ConfigError(
            f"{kind!r} need DENOISING.NAME DenoisingGenerator and queries that are the same for all images, got "
            f"{type(denoising.generator).__name__} and QUERY_SOURCE.NAME {name!r}; take a DN-DETR, for example"
        )
    if kind == LABELS and not query_source.takes_labels:
        raise ConfigError(
            f"{kind!r} take the place of the unknown label in the queries, but those of {name} have a learned content; take "
            "a model with QUERY_SOURCE.CONTENT 'unknown'"
        )


def check_prompts(model: "DenoisingDETR", batched_inputs: list[dict]) -> None:
    """Refuses prompts that are no such thing, or that the model cannot take.

    Raises:
        UserError: objects or labels of other classes, boxes outside of their image, or other fields or types.
        ConfigError: the model has no part for such prompts.
    """
    prompts = [[kind for kind in (KNOWN, LABELS) if kind in record] for record in batched_inputs]
    if model.training and any(kinds != prompts[0] for kinds in prompts):
        raise UserError(f"in training all images of a batch have the same prompts, or none, got {prompts}")
    for record, kinds in zip(batched_inputs, prompts, strict=True):
        if len(kinds) > 1:
            raise UserError(f"an image is given {KNOWN!r} and {LABELS!r}; give one of them")
        for kind in kinds:
            _require_part(model.query_source, model.denoising, kind, model.pixel_decoder is not None)
            num_classes = model.denoising.generator.num_classes
            if kind == KNOWN:
                check_known(record[KNOWN], tuple(record["image"].shape[-2:]), num_classes)
            else:
                check_labels(record[LABELS], num_classes, model.training)


def check_known(known: Instances, image_size: tuple[int, int], num_classes: int) -> None:
    """Raises UserError unless ``known`` has ``gt_boxes`` in an image of (height, width) and ``gt_classes`` of the model."""
    if not isinstance(known, Instances) or not known.has("gt_boxes") or not known.has("gt_classes"):
        got = sorted(known.get_fields()) if isinstance(known, Instances) else type(known).__name__
        raise UserError(f"{KNOWN!r} must be Instances with gt_boxes and gt_classes, got {got}")
    if known.image_size != image_size:
        raise UserError(
            f"{KNOWN!r} are of an image of {known.image_size} (height, width), but the image has {image_size}; give boxes "
            "in its pixels"
        )
    boxes, classes = getattr(known.gt_boxes, "tensor", None), known.gt_classes
    if (
        not isinstance(boxes, Tensor)
        or not isinstance(classes, Tensor)
        or classes.dim() != 1
        or classes.dtype != torch.int64
    ):
        raise UserError(
            f"{KNOWN!r} must have Boxes as gt_boxes and whole numbers (n,) as gt_classes, got "
            f"{type(known.gt_boxes).__name__} and {_kind(classes)}"
        )
    boxes, classes = boxes.cpu(), classes.cpu()
    if len(wrong := classes[(classes < 0) | (classes >= num_classes)]):
        raise UserError(
            f"a known object has class {wrong[0].item()}, but the model has {num_classes} classes, 0 to {num_classes - 1}; "
            "give the class numbers of this model"
        )
    relative = boxes / image_scale(image_size, boxes)
    inside = (relative >= -ROUNDING) & (relative <= 1 + ROUNDING)  # False for NaN
    fine = inside.all(-1) & (boxes[:, 2:] > boxes[:, :2]).all(-1)
    if not fine.all():
        raise UserError(
            f"the known box {[round(x, 2) for x in boxes[~fine][0].tolist()]} must be (x0, y0, x1, y1) with x0 < x1 and y0 "
            f"< y1 inside the image of {image_size} (height, width)"
        )


def _kind(x) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def check_labels(labels: list[int], num_classes: int, one: bool = False) -> None:
    """Raises UserError unless ``labels`` are different classes of the model, in training exactly one."""
    if not isinstance(labels, list | tuple) or not all(type(x) is int for x in labels):
        raise UserError(f"{LABELS!r} must be a list of class numbers, got {labels!r:.60}")
    if wrong := [x for x in labels if not 0 <= x < num_classes]:
        raise UserError(
            f"{LABELS!r} hold {wrong[0]}, but the model has {num_classes} classes, 0 to {num_classes - 1}; give the class "
            "numbers of this model"
        )
    if len(set(labels)) < len(labels) or (one and len(labels) != 1):
        what = "one label in training" if one else "each label once"
        raise UserError(f"{LABELS!r} must hold {what}, got {list(labels)}")


def prompted(
    model: "DenoisingDETR", batched_inputs: list[dict], memory: Memory, queries: ObjectQueries
) -> dict[int, dict[str, Instances]]:
    """Detections of those images of a batch that have prompts, by index.

    Args:
        model: whose parts are used.
        batched_inputs: all images, with checked prompts.
        memory, queries: of all images.
    """
    found = {}
    for kind, detect in ((KNOWN, _find_others), (LABELS, _find_labelled)):
        chosen = [i for i, x in enumerate(batched_inputs) if is_prompted(x) and kind in x]
        if chosen:
            index = torch.tensor(chosen, device=memory.tokens.device)
            part = [batched_inputs[i] for i in chosen]
            found |= zip(
                chosen, detect(model, part, take_images(memory, index), take_images(queries, index)), strict=True
            )
    return found


def _find_others(model: "DenoisingDETR", part: list[dict], memory: Memory, queries: ObjectQueries) -> list[dict]:
    dn = denoising_part(model, None, part, memory)
    return model.postprocess(dn.split(model.decoder(dn.join(queries), memory))[0], part)


def _find_labelled(model: "DenoisingDETR", part: list[dict], memory: Memory, queries: ObjectQueries) -> list[dict]:
    device = memory.tokens.device
    labels = [torch.tensor(x[LABELS], dtype=torch.int64, device=device) for x in part]
    image = torch.cat([torch.full_like(own, i) for i, own in enumerate(labels)])  # of each of the L passes
    asked = model.query_source.prompt(take_images(queries, image), torch.cat(labels))
    return model.postprocess.of_labels(model.decoder(asked, take_images(memory, image)), labels, part)


def prompt_labels(query_source: nn.Module, queries: ObjectQueries, batched_inputs: list[dict]) -> ObjectQueries:
    """The matching queries of training images, with the label of each image where they have one."""
    if LABELS not in batched_inputs[0]:
        return queries
    labels = [x[LABELS][0] for x in batched_inputs]
    return query_source.prompt(queries, torch.tensor(labels, device=queries.content.device))


def denoising_part(
    model: "DenoisingDETR",
    denoising: QueryDenoising | None,
    batched_inputs: list[dict],
    memory: Memory,
    targets: Targets | None = None,
    normalizers: StepNormalizers | None = None,
) -> DenoisingQueries | None:
    """Denoising queries of a batch: of its known objects, which are shown, or of all its objects.

    Args:
        model: what they are for.
        denoising: makes them; None = known objects as they are, and no queries where there are none.
        batched_inputs: all images with known objects, or none.
        memory: of the images.
        targets: of the matching part, used where both parts have the same objects.
        normalizers: of the step that these images are a part of; None = they are all of it.
    """
    known = KNOWN in batched_inputs[0]
    if denoising is None:
        if not known:
            return None
        denoising = model.denoising.clean()
    of_step = normalizers.denoising if normalizers is not None else None
    if known or LABELS in batched_inputs[0]:
        slots = max(of_step.step_counts, default=1) if of_step is not None else 1
        targets = make_targets([denoised_objects(x) for x in batched_inputs], model.device, slots, padded_size(memory))
    return denoising.noise(targets, of_step, known=known)
