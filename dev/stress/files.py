"""Bit flips in checkpoints, and an annotation file of COCO's size."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

from dn_detr_d2 import CheckpointError
from dn_detr_d2.checkpoint import read_checkpoint
from dn_detr_d2.checkpoint.resume import fault_of

from .interrupted_runs import reference_run
from .results import Result

CHECKER = Path(__file__).resolve().parents[2] / "tools" / "check_dataset.py"
COCO_IMAGES, BOXES_PER_IMAGE = 118_000, 7.29  # of train2017: 860 thousand boxes
MAX_SECONDS = 60
PLANTED = 1000  # one box in so many has no width


def coco_size(scratch: Path, images: int, seed: int) -> Result:
    """The time that tools/check_dataset.py takes for so many images, start of Python included; it counts planted faults."""
    draw, boxes = random.Random(seed), int(images * BOXES_PER_IMAGE)
    annotations = [
        {
            "id": i,
            "image_id": draw.randrange(images),
            "category_id": draw.randrange(1, 81),
            "iscrowd": 0,
            "area": 1200.0,
            "bbox": [draw.randrange(600), draw.randrange(440), 30.5 if i % PLANTED else 0, 40],
        }
        for i in range(boxes)
    ]
    content = {
        "images": [{"id": i, "file_name": f"{i:012}.jpg", "width": 640, "height": 480} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 81)],
    }
    (scratch / "big.json").write_text(json.dumps(content))
    del content, annotations
    start = time.monotonic()
    line = [sys.executable, str(CHECKER), str(scratch / "big.json"), str(scratch), "--no-images"]
    done = subprocess.run(line, capture_output=True, text=True)
    seconds, planted = time.monotonic() - start, len(range(0, boxes, PLANTED))
    reported = f"{planted} x box has no positive width and height" in done.stdout
    size = (scratch / "big.json").stat().st_size / 1e6
    observed = f"{size:.0f} MB, {boxes:,} boxes, {planted} planted faults in {seconds:.1f} s"
    wrong = [] if reported and seconds <= MAX_SECONDS else [f"{observed}; {done.stdout[-500:]}{done.stderr[-500:]}"]
    return Result("coco-size", images, observed, wrong, seconds)


def bit_flips(scratch: Path, times: int, seed: int) -> Result:
    """Flips single bits of a training's checkpoint, one at a time; reading the weights and resuming must both refuse it."""
    start, draw, wrong = time.monotonic(), random.Random(seed), []
    folder = scratch / "training"
    folder.mkdir()
    reference_run(folder, ["SOLVER.MAX_ITER", 2], 1)
    path = folder / "model_final.pth"
    original = path.read_bytes()
    for _ in range(times):
        bit = draw.randrange(8 * len(original))
        with path.open("r+b") as file:
            file.seek(bit // 8)
            file.write(bytes([original[bit // 8] ^ 1 << bit % 8]))
        resumed = fault_of(path) or ""
        try:
            read_checkpoint(path)
            read = "read"
        except CheckpointError as error:
            read = str(error)
        if not all("model_final.pth' is damaged: its SHA-256" in sentence for sentence in (resumed, read)):
            wrong.append(f"bit {bit}: resumed from: {resumed or 'yes'}; {read}")
        with path.open("r+b") as file:
            file.seek(bit // 8)
            file.write(original[bit // 8 : bit // 8 + 1])
    if fault_of(path) is not None:
        wrong.append(f"the restored file is refused: {fault_of(path)}")
    observed = f"{times - len(wrong)} found, in a file of {len(original) / 1e6:.1f} MB"
    return Result("bit-flips", times, observed, wrong, time.monotonic() - start)
