"""Panoptic and semantic variants of the embedded data set: what of each object can be seen, and the ground as stuff.

``shapes_panoptic_train``, ``shapes_panoptic_val``, ``shapes_sem_seg_train`` and ``shapes_sem_seg_val`` have the images of
``shapes_train`` and ``shapes_val``; their png are drawn when they are first used.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from . import shapes
from .panoptic import load_panoptic, set_metadata
from .segment_map import NOTHING
from .semantic import load_semantic

CLASSES = (*shapes.CLASSES, "ground")
GROUND = len(shapes.CLASSES)
# Segment ids: of the ground, and the step between those of objects, so that all channels of the png are in use.
GROUND_ID, STEP = 7, 70_001


def register_shapes_segments() -> None:
    """Registers all four sets; nothing is drawn or read yet."""
    for name in shapes.SPLITS:
        folder = folder_of(name)
        panoptic, semantic = (name.replace("shapes_", f"shapes_{kind}_") for kind in ("panoptic", "sem_seg"))
        if panoptic in DatasetCatalog:
            continue
        DatasetCatalog.register(panoptic, partial(_load, name, panoptic=True))
        DatasetCatalog.register(semantic, partial(_load, name, panoptic=False))
        classes = {"thing_classes": list(CLASSES), "stuff_classes": list(CLASSES)}
        ids = {"thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(GROUND)}}
        ids |= {"stuff_dataset_id_to_contiguous_id": {GROUND + 1: GROUND}}
        files = {"panoptic_json": str(folder / "panoptic.json"), "panoptic_root": str(folder / "panoptic")}
        set_metadata(panoptic, classes | ids, files)
        MetadataCatalog.get(semantic).set(
            evaluator_type="sem_seg",
            ignore_label=NOTHING,
            stuff_classes=list(CLASSES),
            sem_seg_root=str(folder / "sem_seg"),
        )


def folder_of(split: str) -> Path:
    """Where the png of ``shapes_train`` or ``shapes_val`` lie."""
    return shapes.cache_folder() / split.replace("shapes_", "shapes_segments_")


def _load(split: str, panoptic: bool) -> list[dict]:
    records, folder = shapes.load_shapes(split), folder_of(split)
    images = Path(records[0]["file_name"]).parent
    if not folder.is_dir():
        generate(folder, *shapes.SPLITS[split])
    if panoptic:
        return load_panoptic(folder / "panoptic.json", folder / "panoptic", images)[0]
    return load_semantic(images, folder / "sem_seg")


def generate(folder: Path, seed: int, num_images: int) -> None:
    """Draws the png of a split into ``folder``: panoptic.json, panoptic/ and sem_seg/."""
    with shapes.drafted(folder) as draft:
        for name in ("panoptic", "sem_seg"):
            (draft / name).mkdir()
        images, annotations = [], []
        for image_id in range(num_images):
            pixels, _, labels, masks = shapes.draw_scene(shapes.Dice([seed, image_id]))
            ids, classes = segments(masks, labels, pixels.shape[:2])
            stem, (height, width) = f"{image_id:05d}", ids.shape
            Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 256**2], 2).astype(np.uint8)).save(
                draft / "panoptic" / f"{stem}.png"
            )
            Image.fromarray(classes).save(draft / "sem_seg" / f"{stem}.png")
            images.append({"id": image_id, "file_name": f"{stem}.bmp", "height": height, "width": width})
            info = [_info(ids == i, i, classes) for i in np.unique(ids).tolist()]
            annotations.append({"image_id": image_id, "file_name": f"{stem}.png", "segments_info": info})
        categories = [{"id": i + 1, "name": name, "isthing": int(i < GROUND)} for i, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (draft / "panoptic.json").write_text(json.dumps(content))


def segments(masks: list[np.ndarray], labels: list[int], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) int64 segment ids and (H, W) uint8 classes of a scene; ``masks`` are ordered from the back to the front."""
    ids, classes = np.full(size, GROUND_ID, np.int64), np.full(size, GROUND, np.uint8)
    for i, (mask, label) in enumerate(zip(masks, labels, strict=True), 1):
        ids[mask], classes[mask] = i * STEP, label
    return ids, classes


def _info(mask: np.ndarray, number: int, classes: np.ndarray) -> dict:
    """An entry of segments_info."""
    rows, columns = (np.flatnonzero(mask.any(axis)).tolist() for axis in (1, 0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    category = int(classes[mask][0]) + 1
    return {"id": number, "category_id": category, "iscrowd": 0, "bbox": box, "area": int(mask.sum())}
