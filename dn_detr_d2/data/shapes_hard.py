"""A harder embedded data set: twelve classes by shape and texture, many objects, occlusion.

``shapes_hard_train``, ``shapes_hard_val`` and ``shapes_hard_test`` are drawn like :mod:`.shapes`, from a seed with integer
arithmetic, when they are first used (the files take 230 MB). Scenes of 256 x 256 pixels have 5 to 25 objects, of which
others may hide up to 60 %; shape alone and texture alone tell no class. Boxes and masks are those of whole objects.
"""

import numpy as np

from .shapes import (
    Dice,
    Scene,
    Split,
    cache_folder,
    draw_ground,
    draw_object,
    hides_too_much,
    object_colour,
    register_split,
)

SHAPES = ("circle", "rectangle", "triangle", "rhombus")
TEXTURES = ("plain", "striped", "dotted")
CLASSES = tuple(f"{texture} {shape}" for texture in TEXTURES for shape in SHAPES)
VERSION = 1  # part of the cache folder's name; raise it when the files change
# name: (seed, images)
SPLITS = {"shapes_hard_train": (21, 800), "shapes_hard_val": (22, 150), "shapes_hard_test": (23, 200)}
SIDE = 256
OBJECTS = (5, 25)  # fewest and most
SIDES = (20, 80)  # shortest and longest side of an object, pixels
MAX_COVERED_PERCENT = 60
TRIES = 40  # places for an object before a scene has one less
PERIODS = (6, 10)  # of stripes and dots, pixels: an object shows two of them at least
TEXTURE_CONTRAST = 110  # in each channel


def register_shapes_hard() -> None:
    """Registers all splits; nothing is drawn or read yet."""
    root = cache_folder().parent / f"shapes-hard-v{VERSION}"
    for name, (seed, num_images) in SPLITS.items():
        register_split(name, Split(root / name, seed, num_images, draw_scene, CLASSES))


def draw_scene(rng: Dice) -> Scene:
    """One scene, drawn from the back to the front; returns what :func:`dn_detr_d2.data.shapes.draw_scene` does."""
    pixels = draw_ground(rng, SIDE, SIDE)
    owner = np.zeros((SIDE, SIDE), np.int64)  # 0 = ground, i = i-th object
    masks, boxes, labels = [], [], []
    for _ in range(rng.integers(OBJECTS[0], OBJECTS[1] + 1)):
        label = rng.integers(len(CLASSES))
        texture, shape = divmod(label, len(SHAPES))
        areas = [int(mask.sum()) for mask in masks]
        for _ in range(TRIES):
            mask, box = draw_object(rng, shape, SIDE, SIDE, SIDES)
            if not hides_too_much(owner, mask, areas, MAX_COVERED_PERCENT):
                break
        else:
            continue
        owner[mask] = len(boxes) + 1
        pixels[mask] = paint(rng, texture, object_colour(rng, pixels, mask), box)[mask]
        for part, item in ((masks, mask), (boxes, box), (labels, label)):
            part.append(item)
    noise = rng.integers(-8, 9, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8), boxes, labels, masks


def paint(rng: Dice, texture: int, colour: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """(H, W, 3) int64 pixels in one colour (3,), or with stripes or dots in a second one, aligned with the object's box."""
    y, x = np.mgrid[:SIDE, :SIDE]
    period, direction = rng.integers(PERIODS[0], PERIODS[1] + 1), rng.integers(4)
    u, v = x - box[0], y - box[1]
    along = (u, v, u + v, u - v)[direction]
    second = (
        np.zeros((SIDE, SIDE), bool),
        along % period < period // 2,
        (2 * (u % period) - period + 1) ** 2 + (2 * (v % period) - period + 1) ** 2 <= (period // 2 + 1) ** 2,
    )[texture]
    other = np.where(colour < 128, colour + TEXTURE_CONTRAST, colour - TEXTURE_CONTRAST)
    return np.where(second[..., None], other, colour)
