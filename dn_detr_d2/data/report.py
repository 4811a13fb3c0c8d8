"""What can be wrong with a data set, and a report that counts it and keeps the first records of each kind."""

from collections import Counter
from dataclasses import dataclass, field

from .images import DAMAGED, DEEP, MISSING, NOT_AN_IMAGE, OUTSIDE, TOO_LARGE

# What follows from a finding, worst first. Only the last is no problem.
STOPS, CHANGED, SPOILS, FINE = "stops the training", "the training drops or clips it", "spoils the result", "to know"
LEVELS = (STOPS, CHANGED, SPOILS, FINE)

NO_IMAGES, NO_CATEGORIES, NO_ANNOTATIONS = "no list of images", "no list of categories", "no list of annotations"
NO_OBJECT = "entry is no object"
IMAGE_ID, ANNOTATION_ID, CATEGORY_ID = (f"{x} id is missing or is neither a whole number nor text" for x in
                                        ("image", "annotation", "category"))  # fmt: skip
SAME_IMAGE_ID, SAME_ANNOTATION_ID, SAME_CATEGORY_ID = (f"{x} id appears more than once" for x in
                                                       ("image", "annotation", "category"))  # fmt: skip
TEXT_ID = "id is text"
FILE_NAME, SAME_FILE_NAME = "image has no file_name", "two images have the same file_name"
NO_SIZE, BAD_SIZE = "image has no width and height", "annotated width or height is no positive whole number"
CATEGORY_NAME, SAME_NAME = "category has no name", "category name appears more than once"
GAPS = "category ids are not 0 .. P-1 or 1 .. P; inside they become 0 .. P-1"
UNKNOWN_IMAGE, UNKNOWN_CATEGORY = "annotation of an image that is not listed", "annotation of an unknown category"
NO_MATCH = "annotation of an image that is not listed, as all of the file are"
TEXT_REFERENCE = "image_id or category_id is text where the id is a number, or the reverse"
TWIN = "category without annotations whose name another one has too, left out"
RESOURCE_FORK = "macOS's ._ file without annotations, left out"
UNANNOTATED = "no annotations: a test set, to predict on only"
ALL_CROWDS = "all annotations are crowds, which training leaves out"
CONVENTION, MAYBE_CONVENTION = "boxes are not [x, y, width, height] in pixels", "boxes all lie in the first 100 pixels"
AREA = "area is no number from 0 to 1e10, width x height is taken"
BAD_BOX, BAD_CROWD = "bbox is not four numbers", "iscrowd is neither 0 nor 1"
NOT_FINITE, NOT_POSITIVE = "box is not finite", "box has no positive width and height"
BOX_OUTSIDE, STICKS_OUT = "box lies outside its image", "box sticks out of its image"
CROWD, NO_BOXES, UNUSED = "crowd, left out in training", "image without boxes", "category without boxes"
NOTHING = "no image has a box"
CROWDED, OVER_BUDGET = "image has more objects than NUM_QUERIES", "image has more objects than the denoising budget"
SIZE = "image has another size than annotated"
TURNED, GREY, PALETTE = "EXIF orientation, applied", "grey image, read as colours", "palette image, read as colours"
ALPHA, CMYK, OTHER_MODE = "alpha channel, left out", "CMYK image, read as RGB", "other colour mode, read as RGB"
SAME_FILE, SAME_BYTES = "image is in both sets", "image of the other set under another name"
NAMESAKE = "file_name is in both sets, with other content"
NOT_COMPARED = "file_name is in both sets, content not compared"

KINDS = {
    **dict.fromkeys((NO_IMAGES, NO_CATEGORIES, NO_ANNOTATIONS, NO_OBJECT, IMAGE_ID, ANNOTATION_ID, CATEGORY_ID), STOPS),
    **dict.fromkeys((SAME_IMAGE_ID, SAME_ANNOTATION_ID, SAME_CATEGORY_ID, FILE_NAME, CATEGORY_NAME, SAME_NAME), STOPS),
    **dict.fromkeys((NO_MATCH, TEXT_REFERENCE, UNKNOWN_CATEGORY, BAD_BOX, BAD_CROWD, BAD_SIZE, SIZE), STOPS),
    **dict.fromkeys((CONVENTION, NOTHING, ALL_CROWDS), STOPS),
    **dict.fromkeys((MISSING, OUTSIDE, NOT_AN_IMAGE, DAMAGED, TOO_LARGE, DEEP), STOPS),
    **dict.fromkeys((UNKNOWN_IMAGE, NOT_FINITE, NOT_POSITIVE, BOX_OUTSIDE, STICKS_OUT), CHANGED),
    **dict.fromkeys((UNANNOTATED, MAYBE_CONVENTION, CROWDED, SAME_FILE_NAME, SAME_FILE, SAME_BYTES), SPOILS),
    **dict.fromkeys((TEXT_ID, NO_SIZE, GAPS, CROWD, NO_BOXES, UNUSED, OVER_BUDGET, NAMESAKE, NOT_COMPARED), FINE),
    **dict.fromkeys((TWIN, RESOURCE_FORK, AREA, TURNED, GREY, PALETTE, ALPHA, CMYK, OTHER_MODE), FINE),
}
# What ``--fix`` repairs.
REPAIRABLE = (NOT_FINITE, NOT_POSITIVE, BOX_OUTSIDE, STICKS_OUT, ANNOTATION_ID, SAME_ANNOTATION_ID, UNKNOWN_IMAGE,
              TEXT_REFERENCE)  # fmt: skip
SHOWN = 5  # records of each kind that are named


@dataclass
class Report:
    """Findings about one data set.

    Attributes:
        counts: how often each of ``KINDS`` was found.
        first: the first ``SHOWN`` records of each kind, in words.
        num_images, num_annotations, num_categories: entries of the file.
        fullest: objects of the fullest image, and its name in words.
        objects: {range of objects in an image: images}.
        classes: {name: boxes}, in the order of the category ids.
    """

    counts: Counter = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    num_images: int = 0
    num_annotations: int = 0
    num_categories: int = 0
    fullest: tuple[int, str] = (0, "none")
    objects: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, where: str) -> None:
        """Counts one finding of a kind; ``where`` names the record and the value."""
        self.counts[kind] += 1
        named = self.first.setdefault(kind, [])
        if len(named) < SHOWN:
            named.append(where)

    def add_rows(self, kind: str, rows, describe) -> None:
        """Counts a finding for each of ``rows``; ``describe(row)`` is called for the named ones only."""
        named = rows[: max(0, SHOWN - self.counts[kind])]
        for row in named:
            self.add(kind, describe(int(row)))
        if len(rows):
            self.counts[kind] += len(rows) - len(named)

    def problems(self) -> dict[str, int]:
        """{kind: count} of everything that is a problem, worst first."""
        return {kind: n for kind, n in self.ordered() if KINDS[kind] != FINE}

    def ordered(self) -> list[tuple[str, int]]:
        """(kind, count) of everything found, worst first, then in the order of ``KINDS``."""
        return sorted(
            ((kind, self.counts[kind]) for kind in KINDS if self.counts[kind]), key=lambda x: LEVELS.index(KINDS[x[0]])
        )

    def lines(self) -> list[str]:
        """The findings for a reader."""
        lines = [f"{self.num_images} images, {self.num_annotations} annotations, {self.num_categories} categories"]
        lines.append(f"objects in an image: at most {self.fullest[0]} ({self.fullest[1]})")
        lines += [f"{objects:>9} objects: {images} images" for objects, images in self.objects.items()]
        if self.classes:
            lines.append("boxes of each class: " + ", ".join(f"{name!r} {n}" for name, n in self.classes.items()))
        for level in LEVELS:
            found = [(kind, n) for kind, n in self.ordered() if KINDS[kind] == level]
            lines += [f"{level}:"] * bool(found)
            for kind, n in found:
                more = f", and {n - len(self.first[kind])} more" if n > len(self.first[kind]) else ""
                lines.append(f"  {n} x {kind}: {'; '.join(self.first[kind])}{more}")
        return [*lines, self.verdict()]

    def verdict(self) -> str:
        """One sentence."""
        problems = self.problems()
        return f"{sum(problems.values())} problems of {len(problems)} kinds" if problems else "no problems"
