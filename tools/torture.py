#!/usr/bin/env python3
"""Kills a training with SIGKILL at random moments, resumes it each time, and compares the end with one left in peace.

    python tools/torture.py --quick
    python tools/torture.py --kills 200
    python tools/torture.py --kills 20 --processes 2

The training is a toy that writes a checkpoint at every step, so that many kills fall into the writing. Prints a table; the
exit code is 1 if a life could not be resumed or a bit of the last checkpoint differs.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from detectron2.utils.env import seed_all_rng  # noqa: E402

from dn_detr_d2 import setup_cfg  # noqa: E402
from dn_detr_d2.engine import Trainer  # noqa: E402
from dn_detr_d2.training import launch  # noqa: E402

TOY = [
    *("MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", 5, "MODEL.RESNETS.NORM", "FrozenBN"),
    *("MODEL.DN_DETR.HIDDEN_DIM", 64, "MODEL.DN_DETR.DECODER.NUM_LAYERS", 2, "DATASETS.TEST", ()),
    *("INPUT.MIN_SIZE_TRAIN", (40, 48), "SOLVER.IMS_PER_BATCH", 2, "SOLVER.CHECKPOINTS_KEPT", 2, "SEED", 5),
]


def life(folder: str, options: list) -> None:
    """One training, from its last checkpoint if it has one."""
    torch.set_num_threads(1)
    seed_all_rng(5)
    cfg = setup_cfg(str(ROOT / "configs" / "quickstart.yaml"), [*TOY, *options, "OUTPUT_DIR", folder])
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    Path(folder, "started").touch()
    trainer.train()


def begin(folder: Path, options: list, processes: int) -> int:
    """Starts a life in a process group of its own, without importing everything again; returns its process id."""
    (folder / "started").unlink(missing_ok=True)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        log = os.open(folder / "lives.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = launch(life, processes, 1, 0, "auto", 60, (str(folder), options))
    except BaseException:  # whatever it is, this copy of the process ends here
        traceback.print_exc()
    finally:
        os._exit(code)


def kill_after(child: int, folder: Path, delay: float) -> int | None:
    """Kills a life some seconds after its training has started; returns its exit code if it ended before."""
    due = None
    while due is None or time.monotonic() < due:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if due is None and (folder / "started").exists():
            due = time.monotonic() + delay
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def differing(first, second, where: str = "") -> list[str]:
    """Names of what is not equal to the bit in two checkpoints."""
    if isinstance(first, dict):
        return [
            n
            for key in first.keys() | second.keys()
            for n in differing(first.get(key), second.get(key), f"{where}.{key}")
        ]
    if isinstance(first, list | tuple):
        pairs = enumerate(zip(first, second, strict=True))
        return [name for i, (a, b) in pairs for name in differing(a, b, f"{where}.{i}")]
    same = first.equal(second) if isinstance(first, torch.Tensor) else first == second
    return [] if same else [where]


def read(folder: Path) -> dict:
    """The last checkpoint, without the config, which names the folder."""
    content = torch.load(folder / "model_final.pth", weights_only=True)
    return {key: value for key, value in content.items() if key != "config"}


def torture(
    folder: Path, kills: int, processes: int, options: list, reach: float, seed: int
) -> tuple[int, int, list[str]]:
    """Lives until one comes to its end.

    Args:
        folder: of the training.
        kills: at most so many lives are killed.
        processes, options: of a life.
        reach: seconds after its start in which a life is killed.
        seed: of the moments.

    Returns:
        tuple: kills, those that left a half-written file, and what went wrong.
    """
    draw, done, writing = random.Random(seed), 0, 0
    while True:
        delay = draw.uniform(0, reach) if done < kills else float("inf")
        code = kill_after(begin(folder, options, processes), folder, delay)
        if code is not None:
            return done, writing, [] if code == 0 else [f"a life ended with code {code}, see {folder / 'lives.log'}"]
        done += 1
        writing += any(folder.glob(".*.part"))
        if sys.stderr.isatty():
            print(f"\r{done} of {kills} kills", end="", file=sys.stderr)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 kills")
    parser.add_argument("--kills", type=int, default=200, help="how many lives are killed at most (200)")
    parser.add_argument("--processes", type=int, default=1, help="CPU processes of the training, over gloo (1)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of each (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    args = parser.parse_args()
    kills = 10 if args.quick else args.kills
    options = ["SOLVER.MAX_ITER", 3 * kills + 10, "SOLVER.CHECKPOINT_PERIOD", 1, "DATALOADER.NUM_WORKERS", args.workers]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dn_detr_d2-torture-") as scratch:
        peaceful, killed = Path(scratch, "peaceful"), Path(scratch, "killed")
        for folder in (peaceful, killed):
            folder.mkdir()
        code = kill_after(begin(peaceful, options, args.processes), peaceful, float("inf"))
        if code != 0:
            print((peaceful / "lives.log").read_text(), file=sys.stderr)
            return 1
        begun = (peaceful / "started").stat().st_mtime
        step = (time.time() - begun) / options[1]
        done, writing, wrong = torture(killed, kills, args.processes, options, 6 * step, args.seed)
        wrong += [] if wrong else [f"differs: {name}" for name in differing(read(peaceful), read(killed))]
        if wrong:
            print("\n".join((killed / "lives.log").read_text().splitlines()[-30:]), file=sys.stderr)
    print("| processes | workers | iterations | kills | left a half-written file | differences | seconds |")
    print("|---|---|---|---|---|---|---|")
    row = (args.processes, args.workers, options[1], done, writing, len(wrong), f"{time.monotonic() - start:.0f}")
    print("| " + " | ".join(map(str, row)) + " |")
    print("\n".join(wrong[:10]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
