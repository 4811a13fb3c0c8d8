"""What a loader process that was killed is reported as; the processes themselves: tests/engine/test_exit.py."""

import pytest

from dn_detr_d2.data.worker_process import explained


def fails(error):
    yield "batch"
    raise error


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (RuntimeError("DataLoader worker (pid(s) 9598) exited unexpectedly"), "9598.*killed"),
        (ConnectionResetError("reset"), "killed.*ConnectionResetError"),
        (EOFError(), "killed.*EOFError"),
    ],
)
def test_a_killed_process_is_told_whichever_way_it_is_noticed(error, named):
    batches = explained(fails(error))
    assert next(batches) == "batch"
    with pytest.raises(RuntimeError, match=named) as caught:
        next(batches)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("a size does not fit"), EOFError("Caught EOFError in worker 0")])
def test_other_errors_stay_as_they_are(error):
    batches = explained(fails(error))
    next(batches)
    with pytest.raises(type(error)) as caught:
        next(batches)
    assert caught.value is error
