"""What is compared with what: the pairs, the ablations, and their overrides.

A variant is a name and [key, value, ...] over the pair's file; nothing else differs within a pair.
"""

from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DENOISING = "MODEL.DN_DETR.DENOISING."
MATCHING, DENOISED, HALF = "matching alone", "with denoising", "with denoising, half the iterations"


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        name: for folders and tables.
        overrides: [key, value, ...] over the pair's config.
        share: of the iterations, in (0, 1]; the learning rate's schedule is shortened with them.
    """

    name: str
    overrides: list = field(default_factory=list)
    share: float = 1.0


def _ablation(name: str, **keys) -> Variant:
    return Variant(name, [part for key, value in keys.items() for part in (DENOISING + key, value)])


# DAB-DETR and DAB-Deformable-DETR are their DN forms without denoising; the dense one has no content either.
UNDENOISED = Variant(MATCHING, [DENOISING + "NAME", ""])
ALONE = {
    "dense": Variant(MATCHING, [DENOISING + "NAME", "", "MODEL.DN_DETR.QUERY_SOURCE.CONTENT", "zero"]),
    "deformable": UNDENOISED,
}
STANDARD = (Variant(DENOISED), Variant(HALF, share=0.5))
# DN-DETR Tables 5 and 6: groups, label noise, box noise, attention mask; then the sizes of the noise.
ABLATIONS = (
    _ablation("1 group", NUM_GROUPS=1),
    _ablation("no label noise", LABEL_NOISE_PROB=0.0),
    _ablation("no box noise", CENTER_NOISE_SCALE=0.0, SIZE_NOISE_SCALE=0.0),
    _ablation("no attention mask", ATTENTION_MASK=False),
    _ablation("gamma 0.5", LABEL_NOISE_PROB=0.5),
    _ablation("lambda 0.8", CENTER_NOISE_SCALE=0.8, SIZE_NOISE_SCALE=0.8),
)
# Other noise than DN-DETR's of the same scale, one kind at a time (docs/noise.md). Half of the sides in the shapes are below
# 0.35; the schedules have the mean 1; the confusion matrix is a file to be given: LABEL_NOISE.CONFUSION_MATRIX.
NOISES = (
    _ablation("gaussian boxes", **{"BOX_NOISE.NAME": "gaussian"}),
    _ablation("truncated gaussian boxes", **{"BOX_NOISE.NAME": "truncated_gaussian"}),
    _ablation("boxes by IoU", **{"BOX_NOISE.NAME": "iou_targeted"}),
    _ablation("scale-aware boxes", **{"BOX_NOISE.NAME": "scale_aware", "BOX_NOISE.REFERENCE_SIZE": 0.35}),
    _ablation("labels by class frequency", **{"LABEL_NOISE.NAME": "class_frequency"}),
    _ablation("labels by confusion", **{"LABEL_NOISE.NAME": "confusion"}),
    _ablation(
        "linear from 1.5 to 0.5",
        **{"NOISE_SCHEDULE.NAME": "linear", "NOISE_SCHEDULE.START": 1.5, "NOISE_SCHEDULE.END": 0.5},
    ),
    _ablation(
        "cosine from 1.5 to 0.5",
        **{"NOISE_SCHEDULE.NAME": "cosine", "NOISE_SCHEDULE.START": 1.5, "NOISE_SCHEDULE.END": 0.5},
    ),
)
PAIRS = tuple(ALONE)
# Longer ones, until the curves are flat: BCCD (DETECTRON2_DATASETS names the folder that holds bccd/) and shapes_hard.
LONG_PAIRS = ("bccd_deformable", "bccd_dino", "shapes_hard_deformable")
# Detectors that were published without denoising; each has a file of its own, in which it has it.
HOSTS = (
    "plain_deformable",
    "refine",
    "two_stage",
    "detr",
    "anchor",
    "faster_rcnn",
    "mask2former",
    "mask_dino",
)


def variants_of(pair: str, ablations: tuple[str, ...] = ()) -> list[Variant]:
    """Everything that is trained for one pair and seed: the baseline, the whole denoising, the rest.

    Args:
        pair: of PAIRS, LONG_PAIRS or HOSTS; of hosts the baseline and the whole denoising.
        ablations: names of those that take the place of the half schedule.
    """
    if pair in HOSTS:
        return [UNDENOISED, STANDARD[0]]
    chosen = tuple(variant for variant in (*ABLATIONS, *NOISES) if variant.name in ablations)
    return [ALONE.get(pair, UNDENOISED), *STANDARD[:1], *(chosen or STANDARD[1:])]
