"""Random number generators (RNGs) of Python, NumPy and PyTorch, on the CPU and on one GPU: seed, save, restore."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int, device: torch.device | str = "cpu") -> None:
    """Seeds the RNGs of Python, NumPy and PyTorch (CPU and ``device``); those of other GPUs are left alone."""
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
    torch.default_generator.manual_seed(seed)
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def derive_seed(*numbers: int) -> int:
    """One seed in [0, 2^63) out of several numbers that are not negative, such as (seed, epoch)."""
    words = np.random.SeedSequence(numbers).generate_state(2, np.uint64)
    return int(words[0] >> np.uint64(1))


def random_state(device: torch.device | str = "cpu") -> dict:
    """The RNG states, in types that ``torch.load(weights_only=True)`` reads.

    Args:
        device: of the model; the RNG state of a GPU is included.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }
    return state | torch_state(device)


def set_random_state(state: dict[str, list | Tensor], device: torch.device | str = "cpu") -> None:
    """Counterpart of :func:`random_state`; the RNG state of a GPU is restored if the state has one."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    set_torch_state(state, device)


def torch_state(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The part of :func:`random_state` that a model draws from; costs some microseconds and no wait for a GPU."""
    state = {"torch": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_torch_state(state: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
    """Counterpart of :func:`torch_state`."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def isolated_rng(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """A context with seeded RNGs of Python, NumPy and PyTorch (CPU and ``device``), whose states are restored afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state(device) if torch.device(device).type == "cuda" else None
    try:
        seed_all(seed, device)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, device)
