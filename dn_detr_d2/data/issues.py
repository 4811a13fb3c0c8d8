"""What can be wrong with a data set."""

from enum import Enum

# Twice Image.MAX_IMAGE_PIXELS as Pillow sets it, above which it raises an error as well: photographs of 108 megapixels are
# read, of which decoded and turned copies take 2 GB. Compared with the header, before decoding.
MAX_PIXELS = 178_956_970


class Severity(Enum):
    """What follows from an issue, worst first. The last is no problem, the one before is one for models with masks."""

    STOPS = "stops the training"
    CHANGED = "the training drops or clips it"
    SPOILS = "spoils the result"
    MASKS = "a problem where masks are trained"
    FINE = "to know"


class Issue(str, Enum):
    """A kind of issue; as a string its description, which reports and their JSON show.

    Attributes:
        severity: what follows from it.
        repairable: whether ``dn-detr check --fix`` repairs it.
    """

    def __new__(cls, text: str, severity: Severity, repairable: bool = False):
        """A member that is the string ``text``."""
        member = str.__new__(cls, text)
        member._value_, member.severity, member.repairable = text, severity, repairable
        return member

    __str__ = str.__str__
    __format__ = str.__format__

    NO_IMAGES = "no list of images", Severity.STOPS
    NO_CATEGORIES = "no list of categories", Severity.STOPS
    NO_ANNOTATIONS = "no list of annotations", Severity.STOPS
    NO_OBJECT = "entry is no object", Severity.STOPS
    IMAGE_ID = "image id is missing or is neither a whole number nor text", Severity.STOPS
    ANNOTATION_ID = "annotation id is missing or is neither a whole number nor text", Severity.STOPS, True
    CATEGORY_ID = "category id is missing or is neither a whole number nor text", Severity.STOPS
    SAME_IMAGE_ID = "image id appears more than once", Severity.STOPS
    SAME_ANNOTATION_ID = "annotation id appears more than once", Severity.STOPS, True
    SAME_CATEGORY_ID = "category id appears more than once", Severity.STOPS
    FILE_NAME = "image has no file_name", Severity.STOPS
    CATEGORY_NAME = "category has no name", Severity.STOPS
    SAME_NAME = "category name appears more than once", Severity.STOPS
    NO_MATCH = "annotation of an image that is not listed, as all of the file are", Severity.STOPS
    TEXT_REFERENCE = "image_id or category_id is text where the id is a number, or the reverse", Severity.STOPS, True
    UNKNOWN_CATEGORY = "annotation of an unknown category", Severity.STOPS
    BAD_BOX = "bbox is not four numbers", Severity.STOPS
    BAD_CROWD = "iscrowd is neither 0 nor 1", Severity.STOPS
    BAD_SIZE = "annotated width or height is no positive whole number", Severity.STOPS
    SIZE = "image has another size than annotated", Severity.STOPS
    CONVENTION = "boxes are not [x, y, width, height] in pixels", Severity.STOPS
    NOTHING = "no image has a box", Severity.STOPS
    ALL_CROWDS = "all annotations are crowds, which training leaves out", Severity.STOPS
    MISSING = "image file does not exist", Severity.STOPS
    OUTSIDE = "image file lies outside the image folder", Severity.STOPS
    NOT_AN_IMAGE = "image file has no allowed format", Severity.STOPS
    DAMAGED = "image is truncated or damaged", Severity.STOPS
    TOO_LARGE = f"image has more than {MAX_PIXELS} pixels", Severity.STOPS
    DEEP = "image has more than 8 bits a channel", Severity.STOPS
    UNKNOWN_IMAGE = "annotation of an image that is not listed", Severity.CHANGED, True
    NOT_FINITE = "box is not finite", Severity.CHANGED, True
    NOT_POSITIVE = "box has no positive width and height", Severity.CHANGED, True
    BOX_OUTSIDE = "box lies outside its image", Severity.CHANGED, True
    STICKS_OUT = "box sticks out of its image", Severity.CHANGED, True
    UNANNOTATED = "no annotations: a test set, to predict on only", Severity.SPOILS
    MAYBE_CONVENTION = "boxes all lie in the first 100 pixels", Severity.SPOILS
    CROWDED = "image has more objects than NUM_QUERIES", Severity.SPOILS
    SAME_FILE_NAME = "two images have the same file_name", Severity.SPOILS
    SAME_FILE = "image is in both sets", Severity.SPOILS
    SAME_BYTES = "image of the other set under another name", Severity.SPOILS
    NO_MASK = "object without a mask", Severity.MASKS
    MASK_FORM = "mask is neither polygons of 3 points or more nor run lengths that fill its image", Severity.MASKS, True
    MASK_SIZE = "run lengths are of an image of another size", Severity.MASKS, True
    MASK_EMPTY = "mask has no area in its image", Severity.MASKS, True
    MASK_OUTSIDE = "mask leaves its image", Severity.MASKS, True
    MASK_BOX = "mask disagrees with its box", Severity.MASKS
    TEXT_ID = "id is text", Severity.FINE
    NO_SIZE = "image has no width and height", Severity.FINE
    GAPS = "category ids are not 0 .. P-1 or 1 .. P; inside they become 0 .. P-1", Severity.FINE
    CROWD = "crowd, left out in training", Severity.FINE
    NO_BOXES = "image without boxes", Severity.FINE
    UNUSED = "category without boxes", Severity.FINE
    OVER_BUDGET = "image has more objects than the denoising budget", Severity.FINE
    NAMESAKE = "file_name is in both sets, with other content", Severity.FINE
    NOT_COMPARED = "file_name is in both sets, content not compared", Severity.FINE
    TWIN = "category without annotations whose name another one has too, left out", Severity.FINE
    RESOURCE_FORK = "macOS's ._ file without annotations, left out", Severity.FINE
    TWICE = "image that is listed twice with the same values, listed once", Severity.FINE
    AREA = "area is no number from 0 to 1e10, width x height is taken", Severity.FINE
    TURNED = "EXIF orientation, applied", Severity.FINE
    GREY = "grey image, read as colours", Severity.FINE
    PALETTE = "palette image, read as colours", Severity.FINE
    ALPHA = "alpha channel, left out", Severity.FINE
    CMYK = "CMYK image, read as RGB", Severity.FINE
    OTHER_MODE = "other colour mode, read as RGB", Severity.FINE
