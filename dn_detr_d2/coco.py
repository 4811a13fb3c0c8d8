"""COCO's two ways of counting its classes: 80 in a row, as Detectron2 does, or 91 raw ids, as the official DETRs do."""

from functools import cache

# The ids of the 80 categories in ascending order; 11 of the 91 rows of an official model are unused.
RAW_IDS = (
    *range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70, *range(72, 83), *range(84, 91),
)  # fmt: skip
NUM_RAW_CLASSES = 91


@cache
def coco_names() -> tuple[str, ...]:
    """Names of the 80 classes in the order of their ids."""
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    return tuple(category["name"] for category in COCO_CATEGORIES if category["isthing"])


@cache
def raw_names() -> tuple[str, ...]:
    """Names of the 91 raw ids; "unused 12" and the like where there is no category."""
    names = dict(zip(RAW_IDS, coco_names(), strict=True))
    return tuple(names.get(i, f"unused {i}") for i in range(NUM_RAW_CLASSES))
