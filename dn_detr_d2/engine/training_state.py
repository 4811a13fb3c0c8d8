"""The state of a training besides weights and optimizer: RNG states of all ranks, the position in the stream of images."""

import logging
from collections.abc import Sequence

import torch
from detectron2.utils import comm

from ..data.stream import StreamLoader
from ..utils.rng import derive_seed, random_state, seed_all, set_random_state
from .loggers import RunLogger, run_ids

logger = logging.getLogger(__name__)


def capture_training_state(loader, device: torch.device, loggers: Sequence[RunLogger] = ()) -> dict:
    """The part of this state that a checkpoint keeps; a collective, rank 0 gets the RNG states of all ranks.

    Args:
        loader: of the training.
        device: of the model.
        loggers: of this rank, whose runs a resumed training goes on with.
    """
    seed = loader.dataset.seed if isinstance(loader, StreamLoader) else None
    state = {"random_states": comm.gather(random_state(device)), "stream_seed": seed}
    return state | ({"logger_runs": run_ids(loggers)} if loggers else {})


def restore_training_state(saved: dict, loader, start_iter: int, device: torch.device, seed: int) -> None:
    """Counterpart of :func:`capture_training_state`; warns of whatever cannot be restored.

    Args:
        saved: content of a checkpoint; keys may be missing in those of older versions.
        loader, device: as for :func:`capture_training_state`.
        start_iter: the next iteration.
        seed: ``SEED`` of the config.
    """
    stream_seed = saved.get("stream_seed")
    if isinstance(loader, StreamLoader):
        if stream_seed is None:
            logger.warning(
                "the checkpoint does not say which order of images it had; a new order begins in the midst of it"
            )
        elif seed >= 0 and seed != stream_seed:
            logger.warning(
                "SEED = %d is not used: the training that is resumed goes on with its own, %d", seed, stream_seed
            )
        loader.seek(start_iter, stream_seed)
    states, rank = saved.get("random_states") or [], comm.get_rank()
    if len(states) == comm.get_world_size():
        set_random_state(states[rank], device)
        return
    logger.warning(
        "the checkpoint has the random states of %d processes, this training has %d: the images come in their order, but "
        "noise and dropout are drawn anew",
        len(states),
        comm.get_world_size(),
    )
    seed_all(derive_seed(stream_seed or 0, start_iter, rank, 2), device)
