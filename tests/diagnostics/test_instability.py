"""IS, churn, anchor distance and ATD(k) against numbers worked out on paper, slow loops and invariances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming

from dn_detr_d2 import DatasetError
from dn_detr_d2.diagnostics import (
    ProbedImage,
    anchor_distances,
    anchor_metrics,
    average_top_k,
    churn,
    instability,
)

# Two decoder layers, four queries, two epochs. Image "a" has two objects, image "b" one, image "c" none.
FIRST = {"a": [[0, 1, -1, -1], [0, -1, 1, -1]], "b": [[-1, 0, -1, -1], [-1, 0, -1, -1]], "c": [[-1] * 4] * 2}
SECOND = {"a": [[1, 0, -1, -1], [0, -1, -1, 1]], "b": [[-1, 0, -1, -1], [0, -1, -1, -1]], "c": [[-1] * 4] * 2}
ANCHORS = [[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1], [0.3, 0.3, 0.4, 0.4], [0.9, 0.9, 0.1, 0.1]]
BOXES = {"a": [[0.5, 0.4, 0.2, 0.1], [0.4, 0.3, 0.4, 0.2]], "b": [[0.1, 0.2, 0.3, 0.1]], "c": []}
AREAS = {"a": [900.0, 5000.0], "b": [1024.0], "c": []}


def arrays(assignment):
    return {key: np.array(value, np.int16) for key, value in assignment.items()}


def images(assignment):
    return [
        ProbedImage(
            key,
            np.array(matched, np.int16),
            np.array(ANCHORS, np.float32),
            np.array(BOXES[key], np.float32).reshape(-1, 4),
            np.array(AREAS[key], np.float32),
        )
        for key, matched in assignment.items()
    ]


def test_instability_of_the_worked_example():
    """Layer 0: a swaps two queries (2), b none, c none: 2 / 3. Layer 1: a and b each move one object (2 + 2): 4 / 3."""
    assert instability(arrays(FIRST), arrays(SECOND)).tolist() == pytest.approx([2 / 3, 4 / 3])


def test_nothing_changes_between_a_state_and_itself():
    assert instability(arrays(FIRST), arrays(FIRST)).tolist() == [0, 0]


def test_churn_of_the_worked_example():
    """First epoch: in a object 1 moves from query 1 to 2 (2 changes), b and c are settled."""
    assert churn(images(FIRST)).tolist() == pytest.approx([2 / 3])


def test_anchor_distances_of_the_worked_example():
    """Last layer of the first epoch: a0, anchor 0: 0.1 + 0.1; a1, anchor 2: 0.1 + 0.2; b0, anchor 1: 0.1 + 0.2."""
    distances, areas = anchor_distances(images(FIRST))
    assert distances.tolist() == pytest.approx([0.2, 0.3, 0.3], abs=1e-6)
    assert areas.tolist() == [900, 5000, 1024]
    metrics = anchor_metrics(images(FIRST), 2)
    assert metrics["distance"] == pytest.approx(0.8 / 3)
    assert metrics["atd"] == pytest.approx(0.3)
    assert metrics["distance_small"] == metrics["atd_small"] == pytest.approx(0.2)  # 1024 pixels are not small


def test_anchor_distances_of_the_second_epoch():
    """Last layer: a0, anchor 0: 0.1 + 0.1; a1, anchor 3: 0.5 + 0.6 + 0.3 + 0.1; b0, anchor 0: 0.4 + 0.3 + 0.1 + 0.1."""
    assert sorted(anchor_distances(images(SECOND))[0].tolist()) == pytest.approx([0.2, 0.9, 1.5], abs=1e-6)
    for order in (1, -1):
        probe = images(SECOND)[::order]
        for k, expected in ((1, 1.5), (2, 1.2), (3, 2.6 / 3), (100, 2.6 / 3)):
            metrics = anchor_metrics(probe, k)
            assert metrics["atd"] == pytest.approx(expected)
            assert metrics["distance"] == pytest.approx(2.6 / 3)


def test_without_small_objects_there_is_no_number_for_them():
    large = [image for image in images(FIRST) if image.image_id == "b"]
    assert set(anchor_metrics(large, 5)) == {"distance", "atd"}


def test_other_images_are_named():
    other = {("d" if key == "b" else key): value for key, value in arrays(SECOND).items()}
    with pytest.raises(DatasetError, match=naming(3, "['b']", "['d']")):
        instability(arrays(FIRST), other)


def test_another_number_of_queries_is_refused():
    wider = {key: np.pad(value, ((0, 0), (0, 1)), constant_values=-1) for key, value in arrays(SECOND).items()}
    with pytest.raises(DatasetError, match=naming("[(2, 4), (2, 5)]")):
        instability(arrays(FIRST), wider)


@st.composite
def two_probes(draw):
    """Random matchings of up to 5 images with up to 4 objects, 3 layers, 6 queries."""
    probes = ({}, {})
    for i in range(draw(st.integers(1, 5))):
        count = draw(st.integers(0, 4))
        for probed in probes:
            rows = [draw(st.permutations([*range(count), *[-1] * (6 - count)])) for _ in range(3)]
            probed[f"{i}"] = np.array(rows, np.int16)
    return probes


@settings(max_examples=60)
@given(two_probes(), st.randoms(use_true_random=False))
def test_instability_is_a_count_that_no_order_of_images_changes(probes, random):
    before, after = probes
    slow = [0, 0, 0]
    for key in before:
        for layer in range(3):
            for query in range(6):
                slow[layer] += int(before[key][layer][query] != after[key][layer][query])
    keys = list(after)
    random.shuffle(keys)
    found = instability(before, {key: after[key] for key in keys})
    assert found.tolist() == pytest.approx([x / len(before) for x in slow])
    assert found.tolist() == instability(after, before).tolist()
    objects = np.mean([(rows[0] >= 0).sum() for rows in before.values()])
    assert (found <= 2 * objects).all()


@settings(max_examples=60)
@given(st.lists(st.floats(0, 4), min_size=1, max_size=30), st.integers(1, 40))
def test_atd_is_the_mean_of_the_largest_and_falls_with_k(values, k):
    distances = np.array(values)
    largest = sorted(values, reverse=True)[:k]
    assert average_top_k(distances, k) == pytest.approx(sum(largest) / len(largest))
    assert average_top_k(distances, k) >= average_top_k(distances, k + 1) - 1e-12
    assert average_top_k(distances, 1000) == pytest.approx(distances.mean())
