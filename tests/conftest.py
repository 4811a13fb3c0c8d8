"""Shared fixtures: small configs of every system, batches of made-up scenes, a private cache for the embedded data set."""

import logging
import os
import tempfile
from pathlib import Path

# Before the package is imported: the embedded data set is drawn once a test run, not into the user's cache.
if "DN_DETR_CACHE" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="dn_detr_d2-tests-")
    os.environ["DN_DETR_CACHE"] = _cache.name

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.logger import setup_logger
from hypothesis import settings

from dn_detr_d2 import setup_cfg
from dn_detr_d2.utils.text_output import escaped

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

TOY = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0),
    # A ResNet-50 as narrow as it goes: a checkpoint of 4 MB, where a ResNet-18 makes 134 MB to write, sync, hash and keep.
    *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.DN_DETR.NUM_CLASSES", 5, "MODEL.DN_DETR.NUM_QUERIES", 9, "MODEL.DN_DETR.HIDDEN_DIM", 64),
    *("MODEL.DN_DETR.ENCODER.NUM_LAYERS", 1, "MODEL.DN_DETR.ENCODER.FFN_DIM", 48, "MODEL.DN_DETR.ENCODER.NUM_HEADS", 4),
    *("MODEL.DN_DETR.DECODER.NUM_LAYERS", 3, "MODEL.DN_DETR.DECODER.FFN_DIM", 48, "MODEL.DN_DETR.DECODER.NUM_HEADS", 4),
    *("MODEL.DN_DETR.MASK.NUM_POINTS", 64, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"),
]
# An example that waits for another process of the machine is no fault.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

SYSTEMS = {
    "dab_detr": "dab_detr_R50_50ep",
    "dn_detr": "dn_detr_R50_50ep",
    "dab_deformable_detr": "dab_deformable_detr_R50_50ep",
    "dn_deformable_detr": "dn_dab_deformable",
    "encoder_only": "dn_deformable_detr_encoder_only_R50_12ep",
    "dino": "dino_R50_4scale_12ep",
    "dino_like": "dino_like_R50_12ep",
    "detr": "detr_R50_500ep",
    "anchor_detr": "anchor_detr_R50_50ep",
}
# Models with masks; a batch for them is make_batch(..., masks=True).
MASK_SYSTEMS = {
    "mask2former": "mask2former_dn_R50_instance_12ep",
    "mask_dino": "mask_dino_R50_instance_50ep",
    "mask_dino_semantic": "mask_dino_R50_semantic_ade20k_160k",
}
DENOISING_SYSTEMS = ("dn_detr", "dn_deformable_detr", "encoder_only", "dino", "dino_like")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _handlers():
    """Takes away what a command line has attached to the loggers: its stream is pytest's, which ends with the test."""
    loggers = [logging.getLogger(name) for name in ("", "detectron2", "fvcore", "dn_detr_d2")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        logger.handlers, _ = handlers, logger.setLevel(level)
    setup_logger.cache_clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Captured logs may hold file names that are not UTF-8, which pytest-xdist cannot send."""
    report = yield
    report.sections = [(name, escaped(text)) for name, text in report.sections]
    return report


@pytest.fixture
def forgotten_sets():
    """Takes away the data sets that a test has registered under a name with test_."""
    yield
    for name in [name for name in DatasetCatalog.list() if name.startswith("test_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def toy_cfg():
    """toy_cfg(system, *overrides) -> config of a small model."""

    def make(system, *overrides):
        return setup_cfg(
            str(ROOT / "configs" / f"{(SYSTEMS | MASK_SYSTEMS).get(system, system)}.yaml"), [*TOY, *overrides]
        )

    return make


@pytest.fixture
def toy_model(toy_cfg):
    """toy_model(system, *overrides) -> a small model with weights off their symmetric start."""

    def make(system, *overrides):
        return off_the_start(build_model(toy_cfg(system, *overrides)))

    return make


def off_the_start(model):
    """The model with random numbers added: zero-initialised heads and offsets would hide what they should react to."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_batch(*counts, sizes=((64, 96), (96, 64), (80, 80)), num_classes=5, seed=0, masks=False):
    """Images of noise with random boxes, one image a count; with ``masks`` the ellipses in the boxes."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for i, count in enumerate(counts):
        height, width = sizes[i % len(sizes)]
        centre = torch.rand(count, 2, generator=generator) * 0.4 + 0.3
        half = torch.rand(count, 2, generator=generator) * 0.1 + 0.05
        boxes = torch.cat([centre - half, centre + half], 1) * torch.tensor([width, height, width, height])
        labels = torch.randint(num_classes, (count,), generator=generator)
        batch.append(
            {
                "image": torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8),
                "height": height,
                "width": width,
                "file_name": f"image_{i}.png",
                "instances": Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=labels),
            }
        )
        if masks:
            batch[-1]["instances"].gt_masks = BitMasks(ellipses(boxes, height, width))
    return batch


def ellipses(boxes, height, width):
    """(n, height, width) bool, the ellipse in each of (n, 4) xyxy boxes."""
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    x0, y0, x1, y1 = boxes.T[:, :, None, None]
    return ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1


def valid_coco(**changes):
    """The content of an annotation file without a fault, with changes; images a.png and b.png are 30 x 20 pixels."""
    return {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 30, "height": 20},
            {"id": 2, "file_name": "b.png", "width": 30, "height": 20},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": 3, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 12},
            {"id": 4, "image_id": 1, "category_id": 2, "bbox": [0, 0, 30, 20], "area": 600},
            {"id": 5, "image_id": 2, "category_id": 2, "bbox": [5.5, 5, 9, 9], "segmentation": [[1, 2]], "area": 81},
        ],
    } | changes
