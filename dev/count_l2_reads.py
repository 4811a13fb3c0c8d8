"""Counts what the CUDA forward kernel of an encoder layer reads from the L2 cache, by a model of the L1 caches; no GPU.

    python dev/count_l2_reads.py

Compares orders of the queries on the points of dev/benchmark_ms_deform_attn.py (offsets of two cells) in an image of 800
x 1333, D = 32, 8 heads. The model: blocks go to the SMs in turn; those that are resident there advance point by point
together; an L1 cache holds the lines that were used last. A row (the channels of a cell and head) takes one line.
"""

import argparse
import sys
from collections import OrderedDict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from dev.benchmark.cases import Shapes, make_case
from dn_detr_d2 import UserError
from dn_detr_d2.command_line import run_command

HEADS, CHANNELS = 8, 32
SMS, LINES = 132, 1600  # of an H100; lines of 128 bytes in the 205 KB that are left beside shared memory
# order -> rows and columns of a tile (no rows: queries in a row), blocks on an SM
ORDERS = {
    "32 in a row": ((0, 32), 5),
    "64 in a row": ((0, 64), 4),
    "tiles 8 x 4": ((4, 8), 5),
    "tiles 8 x 8": ((8, 8), 2),
}


def corners(locations: np.ndarray, shapes: Shapes) -> np.ndarray:
    """(Q, L, K, 2) locations -> (Q, L * K, 4) cells of all levels around each point, -1 outside."""
    found, start = [], 0
    for level, (height, width) in enumerate(shapes):
        column, row = np.floor(locations[:, level] * (width, height) - 0.5).astype(int).transpose(2, 0, 1)[..., None]
        column, row = np.add(column, (0, 1, 0, 1)), np.add(row, (0, 0, 1, 1))
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        found.append(np.where(inside, start + row * width + column, -1))
        start += height * width
    return np.concatenate(found, 1)


def divide(shapes: Shapes, rows: int, columns: int) -> list[np.ndarray]:
    """Queries of each block: tiles of the levels, or ``columns`` queries in a row if ``rows`` is 0."""
    if rows == 0:
        return np.split(
            np.arange(sum(h * w for h, w in shapes)), range(columns, sum(h * w for h, w in shapes), columns)
        )
    blocks, start = [], 0
    for height, width in shapes:
        level = start + np.arange(height * width).reshape(height, width)
        blocks += [
            level[y : y + rows, x : x + columns].ravel()
            for y in range(0, height, rows)
            for x in range(0, width, columns)
        ]
        start += height * width
    return blocks


def count_misses(blocks: list[np.ndarray], cells: np.ndarray, resident: int, sms: int = SMS, lines: int = LINES) -> int:
    """Rows that are not in the L1 cache of the SM that reads them.

    Args:
        blocks: queries of each block.
        cells: (Q, L * K, 4) as from :func:`corners`.
        resident: blocks that an SM works on at a time.
        sms: number of SMs.
        lines: rows that an L1 cache holds.
    """
    misses = 0
    for sm in range(sms):
        cache: OrderedDict[int, None] = OrderedDict()
        for first in range(sm, len(blocks), sms * resident):
            together = np.concatenate(blocks[first : first + sms * resident : sms])
            reads = cells[together].swapaxes(0, 1).ravel()
            for cell in reads[reads >= 0].tolist():
                if cell in cache:
                    cache.move_to_end(cell)
                else:
                    misses += 1
                    cache[cell] = None
                    if len(cache) > lines:
                        cache.popitem(last=False)
    return misses


def report(height: int, width: int) -> None:
    """Prints the table."""
    if min(height, width) < 1:
        raise UserError("--height and --width must be positive")
    case = make_case(height, width, h=1, d=1)
    cells = corners(case["locations"][0, :, 0].double().numpy(), case["shapes"])
    reads = int((cells >= 0).sum())
    megabytes = HEADS * CHANNELS * 4 / 1e6
    print(f"{reads * megabytes:.0f} MB of float32 rows are read in all; from L2:")
    for name, (tile, resident) in ORDERS.items():
        blocks = divide(case["shapes"], *tile)
        misses = count_misses(blocks, cells, resident)
        print(
            f"{name:12} {len(blocks):6} blocks a head  {misses / reads:5.1%} of the reads  "
            f"float32 {misses * megabytes:4.0f} MB  16 bits {misses * megabytes / 2:4.0f} MB"
        )


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--height", type=int, default=800, help="of the image, pixels")
    parser.add_argument("--width", type=int, default=1333)
    args = parser.parse_args(argv)
    return run_command(lambda: report(args.height, args.width))


if __name__ == "__main__":
    sys.exit(main())
