"""How far a training has come, besides weights and optimizer: the random streams of every rank, the stream of images."""

import logging

import torch
from detectron2.utils import comm

from ..data.stream import StreamLoader
from ..utils.rng import mix, random_state, reseed, set_random_state

logger = logging.getLogger(__name__)


def progress(loader, device: torch.device) -> dict:
    """What a checkpoint keeps of it; every rank calls, rank 0 gets all random states.

    Args:
        loader: of the training.
        device: of the model.
    """
    seed = loader.dataset.seed if isinstance(loader, StreamLoader) else None
    return {"random_states": comm.gather(random_state(device)), "stream_seed": seed}


def take_up(saved: dict, loader, start_iter: int, device: torch.device, seed: int) -> None:
    """Counterpart of :func:`progress`; whatever cannot go on as it was is said in a warning.

    Args:
        saved: of a checkpoint; of an older version it may be empty.
        loader, device: as for :func:`progress`.
        start_iter: the iteration that comes next.
        seed: ``SEED`` of the config.
    """
    streamed = saved.get("stream_seed")
    if isinstance(loader, StreamLoader):
        if streamed is None:
            logger.warning(
                "the checkpoint does not say which order of images it had; a new order begins in the midst of it"
            )
        elif seed >= 0 and seed != streamed:
            logger.warning(
                "SEED = %d is not used: the training that is resumed goes on with its own, %d", seed, streamed
            )
        loader.seek(start_iter, streamed)
    states, rank = saved.get("random_states") or [], comm.get_rank()
    if len(states) == comm.get_world_size():
        set_random_state(states[rank], device)
        return
    logger.warning(
        "the checkpoint has the random states of %d processes, this training has %d: the images come in their order, but "
        "noise and dropout are drawn anew",
        *(len(states), comm.get_world_size()),
    )
    reseed(mix(streamed or 0, start_iter, rank, 2), device)
