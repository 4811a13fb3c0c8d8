"""What the examples share: the embedded shapes as tensors, a training loop, COCO's AP, a command line. No denoising.

Only here Detectron2 is needed, for the data set; it is imported when that is read.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn

CLASSES = ("circle", "rectangle", "triangle")
SIDE = 128  # of the square, in pixels, to which images are padded before they are halved


def load(split: str) -> tuple[Tensor, list[dict[str, Tensor]], Path]:
    """Images (n, 3, 64, 64) around 0, DETR's targets, and COCO's annotation file of ``shapes_train`` or ``shapes_val``."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from dn_detr_d2.data import read_image

    records, targets = DatasetCatalog.get(split), []
    images = torch.zeros(len(records), 3, SIDE, SIDE)
    for image, record in zip(images, records, strict=True):
        pixels = torch.from_numpy(read_image(record["file_name"], "RGB").copy()).permute(2, 0, 1)
        image[:, : pixels.shape[1], : pixels.shape[2]] = (pixels - 127.5) / 64
        corners = torch.tensor([x["bbox"] for x in record["annotations"]]).reshape(-1, 4) / SIDE  # x, y, width, height
        labels = torch.tensor([x["category_id"] for x in record["annotations"]], dtype=torch.int64)
        targets.append({"labels": labels, "boxes": torch.cat([corners[:, :2] + corners[:, 2:] / 2, corners[:, 2:]], 1)})
    return nn.functional.avg_pool2d(images, 2), targets, Path(MetadataCatalog.get(split).json_file)


def draw_batch(data: tuple, size: int, generator: torch.Generator) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """A batch of random images, all of them mirrored or none, along both axes."""
    images, targets, _ = data
    chosen = torch.randint(len(images), (size,), generator=generator).tolist()
    mirrored = torch.rand(2, generator=generator) < 0.5  # x, y
    images = images[chosen].flip([axis for axis, yes in zip((3, 2), mirrored.tolist(), strict=True) if yes])
    batch = []
    for x in (targets[i] for i in chosen):
        centre = torch.where(mirrored, 1 - x["boxes"][:, :2], x["boxes"][:, :2])
        batch.append({"labels": x["labels"], "boxes": torch.cat([centre, x["boxes"][:, 2:]], 1)})
    return images, batch


def train(model: nn.Module, losses: Callable, data: tuple, iterations: int, seed: int, report: Callable) -> None:
    """AdamW with a learning rate that falls to 0. What the model draws does not change which images come.

    Args:
        model: that is trained.
        losses: function of images and targets to a dict of losses to add up.
        data: of :func:`load`.
        iterations: number of steps, of 8 images.
        seed: of the order of the images.
        report: is called with the iterations done, the seconds of the steps, and the last losses, at every tenth.
    """
    generator, seconds = torch.Generator().manual_seed(seed), 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for done in range(1, iterations + 1):
        images, targets = draw_batch(data, 8, generator)
        model.train()
        start = time.process_time()
        values = losses(images, targets)
        optimizer.zero_grad()
        sum(values.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - start
        if done % max(iterations // 10, 1) == 0:
            report(done, seconds, values)


@torch.no_grad()
def average_precision(model: nn.Module, predict: Callable, data: tuple) -> tuple[float, float]:
    """COCO's AP and AP50 in percent; ``predict(images)`` gives class probabilities (N, Q, P) and cxcywh boxes (N, Q, 4)."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images, _, annotations = data
    model.eval()
    found = []
    for first in range(0, len(images), 50):
        for i, (scores, boxes) in enumerate(zip(*predict(images[first : first + 50]), strict=True)):
            top, index = scores.flatten().topk(min(30, scores.numel()))
            boxes = SIDE * torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], 1)[index // scores.shape[1]]
            for score, k, box in zip(top.tolist(), (index % scores.shape[1]).tolist(), boxes.tolist(), strict=True):
                found.append({"image_id": first + i, "category_id": k + 1, "bbox": box, "score": score})
    with redirect_stdout(StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0]), 100 * float(evaluation.stats[1])


def run(make: Callable, losses: Callable, predict: Callable, check: Callable, name: str) -> None:
    """The command line of an example.

    Args:
        make: ``make(denoising)`` gives the model.
        losses, predict: functions of the model and what :func:`train` and :func:`average_precision` say.
        check: ``check(model, images, targets)`` raises LeakError if the mask of the decoder leaks.
        name: of the model.
    """
    parser = argparse.ArgumentParser(description=f"{name} on the embedded shapes, with denoising or without")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--no-denoising", action="store_true", help="train by matching alone")
    parser.add_argument("--seed", type=int, default=1, help="of weights, noise and the order of the images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    training, validation = load("shapes_train"), load("shapes_val")
    torch.manual_seed(args.seed)
    model = make(not args.no_denoising)
    if not args.no_denoising:
        check(model, training[0][:4], training[1][:4])

    def report(done: int, seconds: float, values: dict[str, Tensor]) -> None:
        ap, ap50 = average_precision(model, lambda images: predict(model, images), validation)
        line = {"iteration": done, "AP": round(ap, 1), "AP50": round(ap50, 1), "CPU seconds": round(seconds, 1)}
        losses = {key: round(value.item(), 3) for key, value in values.items() if "_" not in key}
        print(json.dumps(line | losses), flush=True)

    train(model, lambda *batch: losses(model, *batch), training, args.iterations, args.seed, report)
