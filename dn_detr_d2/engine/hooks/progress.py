"""A live bar of the training on stderr, where that is a terminal."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.engine import HookBase
from detectron2.utils import comm
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

LOGGERS = ("", "detectron2", "fvcore", "dn_detr_d2")  # those whose lines go to a terminal


class _Bar(tqdm):
    monitor_interval = 0  # no thread: loader processes are forked


class ProgressBar(HookBase):
    """Shows iterations, the loss and the time that is left; log lines appear above the bar. Rank 0 only.

    Args:
        wanted: PROGRESS_BAR.
    """

    def __init__(self, wanted: bool):
        self.wanted, self.bar = wanted, None

    @contextmanager
    def shown(self, start: int, end: int) -> Iterator[None]:
        """A context with the bar, or without where stderr is no terminal.

        Args:
            start: first iteration.
            end: number of iterations of the whole training.
        """
        if not self.wanted or not comm.is_main_process() or not sys.stderr.isatty():
            yield
            return
        loggers = [x for x in map(logging.getLogger, LOGGERS) if any(map(_on_terminal, x.handlers))]
        with (
            _Bar(total=end, initial=start, desc="training", unit="it", dynamic_ncols=True, file=sys.stderr) as self.bar,
            logging_redirect_tqdm(loggers, _Bar),
        ):
            yield
        self.bar = None

    def after_step(self) -> None:
        """One iteration further."""
        if self.bar is not None:
            history = self.trainer.storage.histories().get("total_loss")
            if history is not None:
                self.bar.set_postfix_str(f"loss {history.latest():.4g}", refresh=False)
            self.bar.update()


def _on_terminal(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
