"""Memory of a long training, and of images with many objects."""

import math
import os
import resource
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng

from dn_detr_d2.engine import Trainer

from .results import Result
from .toy import make_cfg

WARM_UP = 600  # iterations before the first sample that counts; one evaluation lies before
BOX_COUNTS = (0, 1, 10, 100, 300, 1000, 3000)
BUDGET = 200  # denoising queries


class MemoryHook(HookBase):
    """Samples memory and open files of the process, every 50 iterations."""

    def __init__(self):
        self.samples = []  # (iteration, bytes of memory, of which private, open files)

    def after_step(self) -> None:
        """Reads /proc."""
        if (self.trainer.iter + 1) % 50 == 0:
            now = memory("VmRSS"), memory("RssAnon"), len(os.listdir("/proc/self/fd"))
            self.samples.append((self.trainer.iter + 1, *now))


def memory(kind: str) -> int:
    """Bytes of this process: "VmRSS" is all, "RssAnon" without the libraries, of which a fork maps more and more."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def in_child(work: Callable[[], list]) -> list:
    """Runs ``work`` in a forked child, which returns a list of numbers."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            torch.set_num_threads(1)
            os.write(writing, " ".join(map(str, work())).encode())
        except BaseException:  # whatever it is, this copy of the process ends here
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        numbers = [float(x) for x in pipe.read().split()]
    os.waitpid(child, 0)
    return numbers


def soak(scratch: Path, iterations: int) -> Result:
    """A training with checkpoints and evaluations: its memory after the warm-up and at the end, and its open files."""
    start = time.monotonic()

    def _train() -> list:
        options = ["SOLVER.MAX_ITER", iterations, "SOLVER.CHECKPOINT_PERIOD", 100, "DATASETS.TEST", ("shapes_val",)]
        seed_all_rng(5)
        trainer = Trainer(make_cfg(scratch, [*options, "TEST.EVAL_PERIOD", max(iterations // 4, 50)]))
        hook = MemoryHook()
        trainer.register_hooks([hook])
        trainer.train()
        return [x for sample in hook.samples if sample[0] >= WARM_UP for x in sample]

    numbers = in_child(_train)
    samples = list(zip(*(numbers[i::4] for i in range(4)), strict=True))
    if not samples:
        return Result("soak", iterations, "", ["the training did not end"], time.monotonic() - start)
    third = max(len(samples) // 3, 1)  # single samples vary with the allocator
    total, growth = _growth([sample[1] for sample in samples], third)
    private, _ = _growth([sample[2] for sample in samples], third)
    files = samples[-1][3] - samples[0][3]
    observed = f"{total}, private {private}; {files:+.0f} open files"
    wrong = [observed] if growth > 1 or files > 0 else []
    return Result("soak", iterations, observed, wrong, time.monotonic() - start)


def _growth(sizes: list[float], part: int) -> tuple[str, float]:
    """From the mean of the first ``part`` sizes to that of the last: in words, and in percent."""
    first, last = sum(sizes[:part]) / part, sum(sizes[-part:]) / part
    percent = 100 * (last / first - 1)
    return f"{first / 1e6:.0f} MB, later {last / 1e6:.0f} MB ({percent:+.2f} %)", percent


def crowded_images(scratch: Path, budget: int = BUDGET) -> Result:
    """Memory of training steps on two images of up to 3,000 boxes, with a budget of denoising queries."""
    start, peaks = time.monotonic(), {}

    for count in BOX_COUNTS:

        def _step(count=count) -> list:
            cfg = make_cfg(scratch, ["MODEL.DN_DETR.DENOISING.MAX_QUERIES", budget])
            model, batch = Trainer.build_model(cfg).train(), crowded_batch(count)
            before = memory("VmRSS")
            for _ in range(2):
                sum(model(batch).values()).backward()
            return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before]

        peaks[count] = (in_child(_step) or [float("nan")])[0] / 1e6
    observed = "MB for " + ", ".join(f"{count:,} boxes {peak:.0f}" for count, peak in peaks.items())
    flat = peaks[BOX_COUNTS[-1]] < peaks[100] + 20
    wrong = [] if flat and not any(map(math.isnan, peaks.values())) else [observed]  # nan: the child has crashed
    return Result(f"crowded-images, MAX_QUERIES {budget}", len(BOX_COUNTS), observed, wrong, time.monotonic() - start)


def crowded_batch(count: int) -> list[dict]:
    """A batch of an image with ``count`` boxes and one with none."""
    draw = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=draw) * 60
    boxes = torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=draw) * 30], 1)
    labels = torch.randint(3, (count,), generator=draw)
    image = torch.randint(256, (3, 96, 96), generator=draw, dtype=torch.uint8)
    instances = Instances((96, 96), gt_boxes=Boxes(boxes), gt_classes=labels)
    return [{"image": image, "instances": instances}, {"image": image, "instances": instances[:0]}]
