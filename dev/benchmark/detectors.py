"""Detectors whose training steps and inferences are timed: ours, and Deformable DETR of Hugging Face's transformers."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from tempfile import TemporaryDirectory

import torch
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from dn_detr_d2 import UserError, setup_cfg
from dn_detr_d2.engine.optimizer import build_optimizer
from dn_detr_d2.engine.train_step import TrainStep
from dn_detr_d2.inference import accelerate, settle
from dn_detr_d2.utils.precision import DTYPES

PRECISIONS = {"fp32": None, **DTYPES}


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        config: a config file.
        opts: its overrides, KEY VALUE KEY VALUE ...
        size: (height, width) of the images in pixels.
        batch: number of images.
        objects: in each image.
        precision: a key of :data:`PRECISIONS`.
        device: "cpu" or "cuda".
        seed: of weights, images and boxes.
        others: further sizes; the images of a batch have all of them in turn.
    """

    config: str
    opts: tuple = ()
    size: tuple[int, int] = (400, 667)
    batch: int = 2
    objects: int = 7
    precision: str = "fp32"
    device: str = "cpu"
    seed: int = 0
    others: tuple[tuple[int, int], ...] = ()


def make_batch(case: Case, classes: int) -> list[dict]:
    """Images of random pixels with boxes and masks at random places, as Detectron2 hands them to a model."""
    random, batch = torch.Generator().manual_seed(case.seed), []
    for i in range(case.batch):
        height, width = (case.size, *case.others)[i % (1 + len(case.others))]
        centre = 0.2 + 0.6 * torch.rand(case.objects, 2, generator=random)
        half = 0.03 + 0.15 * torch.rand(case.objects, 2, generator=random)
        boxes = torch.cat([centre - half, centre + half], 1) * torch.tensor([width, height] * 2)
        masks = torch.zeros(case.objects, height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances = Instances((height, width), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
        instances.gt_classes = torch.randint(classes, (case.objects,), generator=random)
        image = torch.randint(256, (3, height, width), generator=random, dtype=torch.uint8)
        batch.append({"image": image, "height": height, "width": width, "instances": instances})
    return batch


@dataclass
class Detector:
    """A model with its training step.

    Attributes:
        model: the module.
        step: trains once.
        detect: finds objects once; the model is in evaluation mode then.
        optimizer: of the step.
        batch: what it trains on.
    """

    model: nn.Module
    step: Callable[[], None]
    detect: Callable[[], object]
    optimizer: torch.optim.Optimizer
    batch: list[dict]
    _folder: TemporaryDirectory | None = None  # as long as the training step may write there


def config_of(case: Case, *opts):
    """The config of a case, with random weights and no data set, and with more overrides."""
    forced = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", case.device, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    return setup_cfg(case.config, ["MODEL.DN_DETR.NUM_CLASSES", 80, *case.opts, *opts, *forced], splits=())


def build_ours(case: Case, *, settled: bool = False) -> Detector:
    """The detector of a config with the project's own training step.

    Random weights of residual branches with frozen norms would add up until nothing is finite, so their last norms have the
    weight 1/4.

    Args:
        case: what is timed.
        settled: as the predictor prepares a model, see :func:`dn_detr_d2.inference.settle`; then it cannot be trained.
    """
    cfg = config_of(case)
    torch.manual_seed(case.seed)
    model = build_model(cfg)
    for name, buffer in model.named_buffers():
        if name.endswith("conv3.norm.weight"):
            buffer.fill_(0.25)
    if settled:
        settle(model.eval(), cfg)
    optimizer, folder = build_optimizer(cfg, model), TemporaryDirectory()
    own = replace(case, seed=case.seed + comm.get_rank())  # each process has a batch of its own
    batch = make_batch(own, cfg.MODEL.DN_DETR.NUM_CLASSES)
    devices = {} if case.device == "cuda" else {"device_ids": None}
    trained = create_ddp_model(model, broadcast_buffers=False, **devices)  # the model itself in a single process
    trainer = TrainStep(trained, _Again(batch), optimizer, PRECISIONS[case.precision], folder.name)
    iterations = count()

    def step() -> None:
        model.train()
        trainer.iter = next(iterations)
        with EventStorage(trainer.iter):
            trainer.run_step()

    def detect():
        model.eval()
        with torch.inference_mode(), _autocast(case):
            return model(batch)

    return Detector(model, step, detect, optimizer, batch, folder)


def build_accelerated(case: Case, *, settled: bool = False) -> Detector:
    """As :func:`build_ours`, and images pass as ``TEST.COMPILE`` and ``TEST.CUDA_GRAPHS`` say."""
    detector = build_ours(case, settled=settled)
    accelerate(detector.model, config_of(case))
    return detector


class _Again:
    """A data loader that gives one batch again and again."""

    def __init__(self, batch: list[dict]):
        self._batch = batch

    def __iter__(self):
        while True:
            yield self._batch


def _autocast(case: Case) -> torch.autocast:
    dtype = PRECISIONS[case.precision]
    return torch.autocast(case.device, dtype, enabled=dtype is not None)


def build_transformers(case: Case) -> Detector:
    """Deformable DETR of transformers with the widths, layers, queries and levels of our config, and its training step.

    Its loss needs the matcher of SciPy as ours does; AdamW and the clipping of gradients are PyTorch's. fp32 and bf16 only.

    Raises:
        UserError: transformers or timm is missing.
    """
    try:
        from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, DeformableDetrImageProcessor
    except ImportError as error:
        raise UserError(
            f"--against transformers: {error}; pip install 'dn_detr_d2[examples,pretrained]' brings it"
        ) from error
    ours = config_of(case).MODEL.DN_DETR
    classes = ours.NUM_CLASSES
    sizes = {
        f"{part}_{theirs}": value
        for part, node in (("encoder", ours.ENCODER), ("decoder", ours.DECODER))
        for theirs, value in (("layers", node.NUM_LAYERS), ("ffn_dim", node.FFN_DIM))
    }
    config = DeformableDetrConfig(
        d_model=ours.HIDDEN_DIM,
        num_queries=ours.NUM_QUERIES,
        num_feature_levels=ours.NUM_FEATURE_LEVELS,
        num_labels=classes,
        auxiliary_loss=True,
        with_box_refine=ours.DECODER.NAME != "StaticDecoder",
        dropout=ours.DECODER.DROPOUT,
        **sizes,
    )
    torch.manual_seed(case.seed)
    model = DeformableDetrForObjectDetection(config).to(case.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)
    batch = make_batch(case, classes)
    images, labels = _as_transformers_takes_them(batch, case.device)
    processor = DeformableDetrImageProcessor()

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        with _autocast(case):
            loss = model(**images, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        loss.item()

    def detect():
        model.eval()
        with torch.inference_mode(), _autocast(case):
            found = model(**images)
        return processor.post_process_object_detection(found, 0.0, [case.size] * case.batch, top_k=100)

    return Detector(model, step, detect, optimizer, batch)


def _as_transformers_takes_them(batch: list[dict], device: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Normalised images with their masks, and labels with boxes (cxcywh of the image)."""
    pixels = torch.stack([x["image"] for x in batch]).to(device, torch.float32).sub(120).div(60)
    labels = []
    for x in batch:
        height, width = x["instances"].image_size
        boxes = x["instances"].gt_boxes.tensor / torch.tensor([width, height] * 2)
        boxes = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
        labels.append({"class_labels": x["instances"].gt_classes.to(device), "boxes": boxes.to(device)})
    return {"pixel_values": pixels, "pixel_mask": torch.ones_like(pixels[:, 0], dtype=torch.int64)}, labels


RIVALS = ("torch", "transformers")


def build_rival(name: str, case: Case) -> Detector:
    """ "torch": ours with the deformable attention of PyTorch's operators; "transformers": :func:`build_transformers`."""
    if name == "transformers":
        return build_transformers(case)
    return build_ours(replace(case, opts=(*case.opts, "MODEL.DN_DETR.OP_BACKEND", "torch")))


def seconds(run: Callable[[], object], device: str, *, wall: bool = False) -> float:
    """Seconds of one call: of CPU time, with ``wall`` or on a GPU of the clock, until the device has done its work."""
    clock = time.perf_counter if wall or device == "cuda" else time.process_time
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = clock()
    run()
    wait()
    return clock() - start
