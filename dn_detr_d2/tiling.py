"""Large images in overlapping tiles: each passes the detector by itself, and the detections are merged by class-wise NMS.

Small objects keep more pixels when a tile is resized than when the whole image is. Objects larger than a tile are found in
parts.
"""

import math

import numpy as np
import torch
from detectron2.layers import cat
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from .data import ResizeShortestEdge
from .errors import ConfigError
from .modeling.postprocess import class_wise_nms

NMS_THRESHOLD = 0.5  # or TEST.NMS where that is less
FIELDS = {"pred_boxes", "pred_classes", "pred_masks", "scores"}


def tile_starts(length: int, size: int, overlap: float) -> list[int]:
    """First pixels of the tiles along one side of an image, evenly spaced; each tile has min(size, length) pixels.

    Args:
        length: of the side, in pixels.
        size: of a tile, in pixels.
        overlap: part of a tile, in [0, 1), that it shares with the next at least, but for less than a pixel by rounding.
    """
    if length <= size:
        return [0]
    rest, step = length - size, max(size * (1 - overlap), 1.0)
    count = math.ceil(rest / step - 1e-9)
    return [round(i * rest / count) for i in range(count + 1)]


class TiledDetector(nn.Module):
    """A detector of Detectron2 that looks at each image tile by tile.

    Args:
        model: the detector, with boxes or with boxes and masks of instances.
        size: of a tile, in pixels of the image; images that are not larger in either direction are one tile, whose
            detections are returned as they are.
        overlap: see :func:`tile_starts`.
        resize: of each tile before it passes the model.
        batch_size: tiles that pass the model together.
        top_k: detections of an image.
        nms_iou: above which two detections of one class are taken for one object.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        size: int,
        overlap: float,
        resize: ResizeShortestEdge,
        batch_size: int = 1,
        top_k: int = 300,
        nms_iou: float = NMS_THRESHOLD,
    ):
        super().__init__()
        self.model, self.size, self.overlap, self.resize = model, size, overlap, resize
        self.batch_size, self.top_k, self.nms_iou = batch_size, top_k, nms_iou

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Detectron2's interface at inference.

        Args:
            batched_inputs: one dict an image, as the model takes them, with ``image`` (3, H, W) not resized. Known objects
                are cut at the edges of each tile.

        Returns:
            ``{"instances": Instances}`` in pixels of each image, scores descending.

        Raises:
            ConfigError: the model gives something that cannot be merged.
        """
        return [self._detect(record) for record in batched_inputs]

    def _detect(self, record: dict) -> dict:
        height, width = record["image"].shape[-2:]
        ys, xs = (tile_starts(length, self.size, self.overlap) for length in (height, width))
        corners = [(x, y) for y in ys for x in xs]
        tiles = [self._cut(record, *corner) for corner in corners]
        found = []
        for start in range(0, len(tiles), self.batch_size):
            found += self.model(tiles[start : start + self.batch_size])
        if len(found) == 1:
            return found[0]
        return {"instances": self._merge([_instances(x) for x in found], corners, (height, width))}

    def _cut(self, record: dict, x: int, y: int) -> dict:
        """The tile whose upper left corner is (x, y), resized, as an image of its own."""
        pixels = record["image"][:, y : y + self.size, x : x + self.size]
        height, width = pixels.shape[-2:]
        array = pixels.permute(1, 2, 0).cpu().numpy()
        resize = self.resize.get_transform(array)
        resized = np.ascontiguousarray(resize.apply_image(array).transpose(2, 0, 1))
        tile = record | {"image": torch.from_numpy(resized), "height": height, "width": width}
        if "known" in record:
            tile["known"] = _known_in(record["known"], (x, y, x + width, y + height), resize, resized.shape[1:])
        return tile

    def _merge(self, found: list[Instances], corners: list[tuple[int, int]], size: tuple[int, int]) -> Instances:
        """Detections of all tiles in pixels of the image of (height, width), of which NMS leaves the best."""
        boxes = cat([x.pred_boxes.tensor + _shift(*corner, x) for x, corner in zip(found, corners, strict=True)])
        scores, classes = (cat([getattr(x, name) for x in found]) for name in ("scores", "pred_classes"))
        kept = class_wise_nms(boxes, scores, classes, self.nms_iou)[: self.top_k]
        merged = Instances(size, pred_boxes=Boxes(boxes[kept]), scores=scores[kept], pred_classes=classes[kept])
        if found[0].has("pred_masks"):
            merged.pred_masks = _paste(found, corners, size, kept)
        return merged


def _instances(found: dict) -> Instances:
    """The instances of a tile; raises ConfigError where they cannot be merged."""
    instances = found.get("instances")
    fields = set(instances.get_fields()) if instances is not None else set(found)
    if instances is None or not FIELDS - {"pred_masks"} <= fields <= FIELDS:
        raise ConfigError(
            f"TEST.TILE.SIZE merges boxes, classes, scores and masks of instances, but the model gives {sorted(fields)}; "
            "set it to 0"
        )
    return instances


def _shift(x: int, y: int, found: Instances) -> Tensor:
    return found.pred_boxes.tensor.new_tensor([x, y, x, y])


def _paste(found: list[Instances], corners: list[tuple[int, int]], size: tuple[int, int], kept: Tensor) -> Tensor:
    """(n, *size) bool masks of the kept detections, counted through all tiles."""
    masks = torch.zeros((len(kept), *size), dtype=torch.bool, device=kept.device)
    first = 0
    for instances, (x, y) in zip(found, corners, strict=True):
        own = (kept >= first) & (kept < first + len(instances))
        height, width = instances.image_size
        masks[own, y : y + height, x : x + width] = instances.pred_masks[kept[own] - first].bool()
        first += len(instances)
    return masks


def _known_in(known: Instances, tile: tuple[int, int, int, int], resize, size: tuple[int, int]) -> Instances:
    """Known objects of an image, cut at the edges of a tile (x0, y0, x1, y1) and resized with it to (height, width)."""
    x0, y0, x1, y1 = tile
    boxes = known.gt_boxes.tensor.cpu().double() - torch.tensor([x0, y0, x0, y0], dtype=torch.float64)
    limit = torch.tensor([x1 - x0, y1 - y0] * 2, dtype=torch.float64)
    boxes = boxes.clamp(min=0).minimum(limit)
    inside = (boxes[:, 2:] - boxes[:, :2]).min(1).values >= 1  # a pixel in both directions
    moved = torch.from_numpy(resize.apply_box(boxes[inside].numpy())).float()
    return Instances(tuple(size), gt_boxes=Boxes(moved), gt_classes=known.gt_classes.cpu()[inside])


def with_tiles(model: nn.Module, cfg) -> nn.Module:
    """The model as ``TEST.TILE`` asks for it: in tiles, or as it is where SIZE is 0."""
    node = cfg.TEST.TILE
    if not node.SIZE:
        return model
    return TiledDetector(
        model,
        size=node.SIZE,
        overlap=node.OVERLAP,
        resize=ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST),
        batch_size=cfg.TEST.IMS_PER_BATCH,
        top_k=cfg.TEST.DETECTIONS_PER_IMAGE,
        nms_iou=min(NMS_THRESHOLD, cfg.TEST.NMS),
    ).train(model.training)
