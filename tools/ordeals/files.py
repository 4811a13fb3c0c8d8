"""Checkpoints that change on the disk."""

import random
import time
from pathlib import Path

from dn_detr_d2 import CheckpointError
from dn_detr_d2.checkpoint import read_checkpoint
from dn_detr_d2.training.folder import fault_of

from .lives import in_peace
from .results import Result


def flips(scratch: Path, times: int, seed: int) -> Result:
    """Flips single bits of a training's checkpoint, one at a time; the reader of weights and the resumer must tell."""
    start, draw, wrong = time.monotonic(), random.Random(seed), []
    folder = scratch / "training"
    folder.mkdir()
    in_peace(folder, ["SOLVER.MAX_ITER", 2], 1)
    path = folder / "model_final.pth"
    whole = path.read_bytes()
    for _ in range(times):
        bit = draw.randrange(8 * len(whole))
        with path.open("r+b") as file:
            file.seek(bit // 8)
            file.write(bytes([whole[bit // 8] ^ 1 << bit % 8]))
        told = fault_of(path) or ""
        try:
            read_checkpoint(path)
            read = "read"
        except CheckpointError as error:
            read = str(error)
        if not all("model_final.pth' is damaged: its SHA-256" in sentence for sentence in (told, read)):
            wrong.append(f"bit {bit}: resumed from: {told or 'yes'}; {read}")
        with path.open("r+b") as file:
            file.seek(bit // 8)
            file.write(whole[bit // 8 : bit // 8 + 1])
    if fault_of(path) is not None:
        wrong.append(f"the file as it was is refused: {fault_of(path)}")
    seen = f"{times - len(wrong)} found, in a file of {len(whole) / 1e6:.1f} MB"
    return Result("flips", times, seen, wrong, time.monotonic() - start)
