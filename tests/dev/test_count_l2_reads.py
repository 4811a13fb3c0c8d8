"""The model of the L1 caches on sequences that can be followed by hand, and that tiles read less."""

import numpy as np
import pytest

from dev.benchmark.cases import make_case
from dev.count_l2_reads import corners, count_misses, divide, main


def cells(*queries):
    """(Q, 1, 4) of queries that read two cells each."""
    return np.array([[[*pair, -1, -1]] for pair in queries])


def test_a_cache_of_two_rows_keeps_those_used_last():
    """0 1 | 1 2 | 0 2: 0, 1 are loaded, 2 replaces 0, 0 replaces 1, 2 is still there."""
    blocks = [np.array([0]), np.array([1]), np.array([2])]
    assert count_misses(blocks, cells((0, 1), (1, 2), (0, 2)), resident=1, sms=1, lines=2) == 4
    assert count_misses(blocks, cells((0, 1), (1, 2), (0, 2)), resident=1, sms=1, lines=3) == 3
    assert count_misses(blocks, cells((0, 1), (1, 2), (0, 2)), resident=1, sms=3, lines=3) == 6


def test_corners_of_a_point_between_four_cells_and_of_one_over_the_edge():
    """In 2 x 3 cells after a level of one: x = 1/2 is column 1, y = 1/2 between the rows; (0, 0) touches one cell."""
    locations = np.array([[[[9.0, 9.0]], [[0.5, 0.5]]], [[[0.5, 0.5]], [[0.0, 0.0]]]])
    found = corners(locations, [(1, 1), (2, 3)])
    assert found.tolist() == [[[-1, -1, -1, -1], [2, 3, 5, 6]], [[0, -1, -1, -1], [-1, -1, -1, 1]]]


@pytest.mark.parametrize("tile", [(0, 5), (2, 3), (8, 8)])
def test_each_query_is_in_one_block(tile):
    shapes = [(5, 7), (0, 3), (3, 1)]
    assert sorted(np.concatenate(divide(shapes, *tile)).tolist()) == list(range(38))


def test_tiles_read_less_from_the_second_level():
    """Of an encoder's points, with caches that hold a fifth of the map."""
    case = make_case(200, 300, h=1, d=1)
    found = corners(case["locations"][0, :, 0].double().numpy(), case["shapes"])
    in_rows, tiles = (
        count_misses(divide(case["shapes"], *tile), found, 2, sms=4, lines=250) for tile in ((0, 64), (8, 8))
    )
    assert tiles < 0.7 * in_rows


def test_the_program_prints_a_line_for_each_order(capsys):
    assert main(["--height", "64", "--width", "96"]) == 0
    assert capsys.readouterr().out.count("blocks a head") == 4
