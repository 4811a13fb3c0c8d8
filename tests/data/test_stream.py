"""The stream of training images: every image once an epoch, the same for any number of processes and workers."""

from itertools import islice

import numpy as np
import pytest

from dn_detr_d2.data import build_train_loader
from dn_detr_d2.data.stream import Positions, TrainingStream

RECORDS = [{"image_id": i} for i in range(11)]


def drawing(record):
    return {**record, "drawn": np.random.rand()}


def ids(stream, positions):
    return [stream[i]["image_id"] for i in positions]


def test_an_epoch_is_every_image_once_in_an_order_of_its_own():
    stream = TrainingStream(RECORDS, drawing, 3)
    epochs = [ids(stream, range(11 * e, 11 * e + 11)) for e in range(4)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert ids(TrainingStream(RECORDS, drawing, 4), range(11)) != epochs[0]


def test_a_position_is_the_same_image_and_the_same_draw_whatever_was_read_before():
    forward, backward = TrainingStream(RECORDS, drawing, 3), TrainingStream(RECORDS, drawing, 3)
    first = [forward[i] for i in range(30)]
    assert [backward[i] for i in reversed(range(30))][::-1] == first
    assert len({item["drawn"] for item in first}) == 30


def test_reading_an_image_leaves_the_random_stream_of_the_model_alone():
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    _ = TrainingStream(RECORDS, drawing, 3)[4]
    assert np.random.rand() == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_the_batches_of_all_processes_together_do_not_depend_on_their_number(world_size):
    shares = [islice(Positions(6, rank, world_size), 5) for rank in range(world_size)]
    batches = [sorted(i for part in parts for i in part) for parts in zip(*shares, strict=True)]
    assert batches == [list(range(6 * t, 6 * t + 6)) for t in range(5)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_begins_where_it_is_told(toy_cfg, workers):
    overrides = ["DATASETS.TRAIN", ("shapes_train",), "MODEL.DN_DETR.NUM_CLASSES", "auto", "SOLVER.IMS_PER_BATCH", 2]
    cfg = toy_cfg("dn_detr", *overrides, "SEED", 5, "DATALOADER.NUM_WORKERS", workers, "INPUT.MIN_SIZE_TRAIN", (40, 60))
    whole = list(islice(build_train_loader(cfg), 6))
    later = build_train_loader(cfg)
    later.seek(4)
    for expected, found in zip(whole[4:], islice(later, 2), strict=True):
        assert [x["image_id"] for x in expected] == [x["image_id"] for x in found]
        assert all(a["image"].equal(b["image"]) for a, b in zip(expected, found, strict=True))


def test_another_sampler_is_said_to_lose_the_order(toy_cfg, caplog):
    overrides = ["DATASETS.TRAIN", ("shapes_train",), "MODEL.DN_DETR.NUM_CLASSES", "auto"]
    cfg = toy_cfg("dn_detr", *overrides, "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    build_train_loader(cfg)
    assert "a training that is resumed begins a new order of images" in caplog.text
