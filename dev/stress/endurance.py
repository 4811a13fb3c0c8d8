"""What grows in a long training, and what a crowded image costs."""

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

WARM_UP = 600  # iterations after which the memory is looked at for the first time; one evaluation lies before
CROWDS = (0, 1, 10, 100, 300, 1000, 3000)
BUDGET = 200  # denoising queries


class Footprint(HookBase):
    """Notes what the process holds, every 50 iterations."""

    def __init__(self):
        self.notes = []  # (iteration, bytes of memory, of which private, open files)

    def after_step(self) -> None:
        """Looks into /proc."""
        if (self.trainer.iter + 1) % 50 == 0:
            now = memory("VmRSS"), memory("RssAnon"), len(os.listdir("/proc/self/fd"))
            self.notes.append((self.trainer.iter + 1, *now))


def memory(kind: str) -> int:
    """Bytes of this process: "VmRSS" is all, "RssAnon" without the libraries, of which a fork maps more and more."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def apart(work: Callable[[], list]) -> list:
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
        footprint = Footprint()
        trainer.register_hooks([footprint])
        trainer.train()
        return [x for note in footprint.notes if note[0] >= WARM_UP for x in note]

    numbers = apart(_train)
    notes = list(zip(*(numbers[i::4] for i in range(4)), strict=True))
    if not notes:
        return Result("soak", iterations, "", ["the training did not end"], time.monotonic() - start)
    third = max(len(notes) // 3, 1)  # single notes waver by the allocator
    whole, growth = _growth([note[1] for note in notes], third)
    private, _ = _growth([note[2] for note in notes], third)
    files = notes[-1][3] - notes[0][3]
    seen = f"{whole}, private {private}; {files:+.0f} open files"
    wrong = [seen] if growth > 1 or files > 0 else []
    return Result("soak", iterations, seen, wrong, time.monotonic() - start)


def _growth(sizes: list[float], part: int) -> tuple[str, float]:
    """From the mean of the first ``part`` sizes to that of the last: in words, and in percent."""
    first, last = sum(sizes[:part]) / part, sum(sizes[-part:]) / part
    percent = 100 * (last / first - 1)
    return f"{first / 1e6:.0f} MB, later {last / 1e6:.0f} MB ({percent:+.2f} %)", percent


def crowds(scratch: Path, budget: int = BUDGET) -> Result:
    """Memory of training steps on two images of up to 3,000 boxes, with a budget of denoising queries."""
    start, peaks = time.monotonic(), {}

    for count in CROWDS:

        def _step(count=count) -> list:
            cfg = make_cfg(scratch, ["MODEL.DN_DETR.DENOISING.MAX_QUERIES", budget])
            model, batch = Trainer.build_model(cfg).train(), crowded(count)
            before = memory("VmRSS")
            for _ in range(2):
                sum(model(batch).values()).backward()
            return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before]

        peaks[count] = (apart(_step) or [float("nan")])[0] / 1e6
    seen = "MB for " + ", ".join(f"{count:,} boxes {peak:.0f}" for count, peak in peaks.items())
    flat = peaks[CROWDS[-1]] < peaks[100] + 20
    return Result(f"crowds, MAX_QUERIES {budget}", len(CROWDS), seen, [] if flat else [seen], time.monotonic() - start)


def crowded(count: int) -> list[dict]:
    """A batch of an image with ``count`` boxes and one with none."""
    draw = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=draw) * 60
    boxes = torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=draw) * 30], 1)
    labels = torch.randint(3, (count,), generator=draw)
    image = torch.randint(256, (3, 96, 96), generator=draw, dtype=torch.uint8)
    instances = Instances((96, 96), gt_boxes=Boxes(boxes), gt_classes=labels)
    return [{"image": image, "instances": instances}, {"image": image, "instances": instances[:0]}]
