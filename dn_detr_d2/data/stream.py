"""The endless stream of training images as a pure function of (seed, position).

Position i of the stream is image ``order(seed, i // N)[i % N]`` of N, augmented with the random numbers of (seed, i).
Iteration t of batch size B takes the positions from t * B on, whatever the number of processes and loader workers; resuming
needs no other state.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from detectron2.data import DatasetFromList
from torch.utils.data import DataLoader, Dataset, Sampler

from ..utils.rng import derive_seed, isolated_rng
from .worker_process import end_at_exit, explained, init_worker, signals_wait


class TrainingStream(Dataset):
    """Positions of the stream -> augmented images.

    Args:
        records: Detectron2's dicts; N of them.
        mapper: augments one.
        seed: of the order and of the augmentation, not negative.
    """

    def __init__(self, records: list[dict], mapper: Callable[[dict], dict], seed: int):
        self.records, self.mapper, self.seed = DatasetFromList(records, copy=False), mapper, seed
        self._shuffled = (-1, None)  # (epoch, its order)

    def reseed(self, seed: int) -> None:
        """Puts another stream in place of this one."""
        self.seed, self._shuffled = seed, (-1, None)

    def index(self, position: int) -> int:
        """The index of the record at a position."""
        epoch, row = divmod(position, len(self.records))
        if self._shuffled[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
            self._shuffled = (epoch, torch.randperm(len(self.records), generator=generator))
        return int(self._shuffled[1][row])

    def __getitem__(self, position: int) -> dict:
        return self.augmented(position, position)

    def augmented(self, place: int, position: int) -> dict:
        """The image at a place of the order, augmented with the random numbers of a position."""
        record = self.records[self.index(place)]
        with isolated_rng(derive_seed(self.seed, position, 1)):
            return self.mapper(record)


class Positions(Sampler):
    """The positions of one process, a list for each iteration: every ``world_size``-th of the whole batch.

    Args:
        batch_size: B, of all processes together.
        rank, world_size: of this process.
    """

    def __init__(self, batch_size: int, rank: int = 0, world_size: int = 1):
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.start = 0  # iteration that the next iterator begins with

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start * self.batch_size
        while True:
            yield list(range(first + self.rank, first + self.batch_size, self.world_size))
            first += self.batch_size


class MixedStream(Dataset):
    """A stream of annotated images and one of images without annotations, under positions (which of the two, position).

    Args:
        annotated, unlabeled: the two; the second gets its seed from that of the first.
    """

    def __init__(self, annotated: TrainingStream, unlabeled: TrainingStream):
        self.streams = annotated, unlabeled
        self.reseed(annotated.seed)

    @property
    def seed(self) -> int:
        """That of the annotated images."""
        return self.streams[0].seed

    def reseed(self, seed: int) -> None:
        """Puts other streams in place of these."""
        annotated, unlabeled = self.streams
        annotated.reseed(seed)
        unlabeled.reseed(derive_seed(seed, 0, 3))

    def __getitem__(self, position: tuple[int, int]) -> dict:
        which, place = position
        return self.streams[which][place]


class MixedPositions(Sampler):
    """Positions of a :class:`MixedStream`: batches of annotated images, and after some iterations of others behind them.

    Args:
        annotated, unlabeled: positions of the two; the second begins with its first batch.
        burn_in: iterations without the second.
    """

    def __init__(self, annotated: Positions, unlabeled: Positions, burn_in: int):
        self.annotated, self.unlabeled, self.burn_in = annotated, unlabeled, burn_in
        self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        self.annotated.start, self.unlabeled.start = self.start, max(self.start - self.burn_in, 0)
        annotated, unlabeled = iter(self.annotated), iter(self.unlabeled)
        for iteration in itertools.count(self.start):
            batch = [(0, position) for position in next(annotated)]
            if iteration >= self.burn_in:
                batch += [(1, position) for position in next(unlabeled)]
            yield batch


class StreamLoader(DataLoader):
    """Batches of the stream; :meth:`seek` chooses where it begins.

    Args:
        stream, positions: see there, or mixed ones.
        num_workers: loader processes; 0 = in this process.
        pin_memory: whether a thread puts the images into pinned memory, out of which a copy to a GPU makes nobody wait.
    """

    def __init__(
        self,
        stream: TrainingStream | MixedStream,
        positions: Positions | MixedPositions,
        num_workers: int,
        *,
        pin_memory: bool = False,
    ):
        super().__init__(
            stream,
            batch_sampler=positions,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=list,
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # else the start of an iterator would draw from the model's stream
        )
        end_at_exit()

    def __iter__(self) -> Iterator[list[dict]]:
        """Endless batches."""
        with signals_wait():
            batches = super().__iter__()
        return explained(batches)

    def seek(self, iteration: int, seed: int | None = None) -> None:
        """Lets the next iterator begin with an iteration; ``seed`` puts another stream in place of the present one."""
        self.batch_sampler.start = iteration
        if seed is not None:
            self.dataset.reseed(seed)
