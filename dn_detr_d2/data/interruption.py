"""Interrupts an evaluation when the training is asked to stop, on all ranks together.

During an evaluation every loader of :mod:`.loader` that goes over a data set once checks before each batch whether a stop
was requested, and ends early. Ranks that end at different batches meet in the next collective, where :func:`agree` raises on
all.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader

from .worker_process import explained, guard, signals_wait


class Interrupted(BaseException):
    """Work was interrupted because the training is to stop. No error, so ``except Exception`` must not catch it."""


_asked: list[Callable[[], bool]] = []
_raising: list[Callable[[], AbstractContextManager]] = []


@contextmanager
def interruptible(
    asked: Callable[[], bool], raising: Callable[[], AbstractContextManager] = nullcontext
) -> Iterator[None]:
    """A context in which loaders end early once ``asked()`` is true, and :func:`agree` raises; all ranks enter it or none.

    Args:
        asked: whether this rank is to stop, or knows of another one that is.
        raising: a context in which a request raises Interrupted at once, see :func:`without_exchange`.
    """
    _asked.append(asked)
    _raising.append(raising)
    try:
        yield
    finally:
        _asked.pop()
        _raising.pop()


@contextmanager
def without_exchange() -> Iterator[None]:
    """Around long work of one rank without collectives: a request to stop interrupts it.

    The others wait in their next collective, which must be an :func:`agree`.
    """
    try:
        with _raising[-1]() if _raising else nullcontext():
            if _asked and _asked[-1]():
                raise Interrupted
            yield
    except Interrupted:
        agree()
        raise


def until_asked(batches: Iterable) -> Iterator:
    """The batches, until a stop is requested."""
    for batch in batches:
        if _asked and _asked[-1]():
            return
        yield batch


def agree() -> None:
    """Raises Interrupted on all ranks if one of them is to stop. A collective."""
    if _asked and any(comm.all_gather(_asked[-1]())):
        raise Interrupted


class OncePassLoader(DataLoader):
    """A DataLoader for evaluations: it ends early on a request to stop, and its workers end with this process."""

    def __iter__(self) -> Iterator:
        """Batches in the order of the sampler."""
        with signals_wait():
            batches = super().__iter__()
        return until_asked(explained(batches))


def evaluation_loader(
    records: list[dict],
    mapper: Callable[[dict], dict],
    batch_size: int,
    num_workers: int,
    *,
    pin_memory: bool = False,
) -> OncePassLoader:
    """A loader of lists of mapped images, each image on one rank only; the last list of a rank has what is left.

    Args:
        records: Detectron2's dicts.
        mapper: reads one.
        batch_size: images of a list.
        num_workers: loader processes; 0 = in this process.
        pin_memory: as for :class:`.stream.StreamLoader`.
    """
    images = MapDataset(DatasetFromList(records, copy=False), mapper)
    sampler = InferenceSampler(len(images))
    options = {"num_workers": num_workers, "pin_memory": pin_memory, "collate_fn": list}
    return guard(OncePassLoader(images, batch_size, sampler=sampler, **options))
