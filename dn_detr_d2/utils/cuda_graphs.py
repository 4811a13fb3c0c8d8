"""A function of tensors recorded once for each shape of its inputs and replayed: CUDA graphs with a bound on their number.

A pass of a detector launches some thousand kernels, and a GPU that works faster than the host launches waits for it. A graph
launches them all at once, at fixed addresses: inputs are copied into buffers of its own, outputs are copied out of them.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
WARM_UP = 3  # passes before a recording, in which libraries allocate and choose what they would not inside it


def _without_cached_casts() -> torch.autocast:
    """Autocast as it is, but for its cache: weights that it cast before a recording would be freed while that is used."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", dtype, enabled, cache_enabled=False)


# PyTorch allows one recording at a time in a process, and none while it waits for a whole device.
_RECORDS = threading.Lock()


class Shared:
    """What the recordings of one device have in common; made with that device as the current one.

    Attributes:
        pool: memory, of :func:`torch.cuda.graph_pool_handle`. That is allowed because a recording keeps nothing from pass to
            pass, and no two of them run at the same time.
        done: recorded behind each pass, so that the next one waits for it.
        stream: that they are recorded on; what one has allocated for it another may use again.
    """

    def __init__(self):
        self.pool, self.done, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Event(), torch.cuda.Stream()


class CudaRecording:
    """One pass of a function, recorded as a CUDA graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).

    Args:
        function: of the inputs to a tuple of tensors: no step of it may read the device, or upload from the host.
        inputs: on a GPU; their values are those of the first pass, their shapes those of all.
        shared: of the device of the inputs, which is the current one.
    """

    def __init__(self, function: Function, inputs: tuple[Tensor, ...], shared: "Shared"):
        self._device, self._done = inputs[0].device, shared.done
        self._inputs = tuple(x.detach().clone() for x in inputs)
        current, side = torch.cuda.current_stream(), shared.stream
        current.wait_event(self._done)
        side.wait_stream(current)
        with _without_cached_casts():
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    function(*self._inputs)
            current.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads, such as those that pin batches for a loader, may go on allocating. Without a stream PyTorch has
            # one for all recordings, which is of the device of the first one in the process.
            with torch.cuda.graph(self._graph, pool=shared.pool, stream=side, capture_error_mode="thread_local"):
                self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the function gives for other inputs of the same shapes, in tensors that later passes leave alone."""
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().wait_event(self._done)
            for buffer, x in zip(self._inputs, inputs, strict=True):
                buffer.copy_(x, non_blocking=True)
            self._graph.replay()
            outputs = tuple(x.clone() for x in self._outputs)
            self._done.record()
        return outputs

    def release(self) -> None:
        """Gives the memory back, when the device has done what was asked of it."""
        torch.cuda.synchronize(self._device)
        self._graph.reset()
        self._outputs = ()


class Replayed:
    """A function of tensors, recorded for each shape of its inputs; threads may share it, one runs at a time.

    Args:
        function: of tensors on one GPU to a tuple of tensors, see :class:`CudaRecording`.
        limit: at most so many recordings are kept; the one that was not used for longest makes place.
        record: makes a recording, (function, inputs) -> an object with ``__call__`` and ``release``; None = CUDA graphs.

    Raises:
        ValueError: ``limit`` is not positive.
    """

    def __init__(self, function: Function, limit: int, record: Callable | None = None):
        if limit < 1:
            raise ValueError(f"limit must be a positive number of recordings, got {limit}")
        self.function, self.limit = function, limit
        self._record = record or CudaRecorder()
        self._kept: OrderedDict[tuple, Callable] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many recordings are kept."""
        return len(self._kept)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """As of the function, in inference mode."""
        device_type = inputs[0].device.type
        precision = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
        key = (precision, *((tuple(x.shape), x.dtype, x.device) for x in inputs))
        with self._lock, torch.inference_mode():
            if key in self._kept:
                self._kept.move_to_end(key)
            else:
                with _RECORDS:
                    if len(self._kept) == self.limit:
                        self._kept.popitem(last=False)[1].release()
                    self._kept[key] = self._record(self.function, inputs)
            return self._kept[key](*inputs)


class CudaRecorder:
    """Makes recordings that share their memory, and that wait for each other on whatever streams they are replayed.

    Args:
        shared: makes what the recordings of a device share.
        recording: makes a recording, (function, inputs, shared).
    """

    def __init__(self, shared: Callable = Shared, recording: Callable = CudaRecording):
        self._make, self._recording = shared, recording
        self._shared: dict[torch.device, Shared] = {}

    def __call__(self, function: Function, inputs: tuple[Tensor, ...]) -> CudaRecording:
        """A recording of the function for inputs like these."""
        device = inputs[0].device
        with torch.cuda.device(device):
            if device not in self._shared:
                self._shared[device] = self._make()
            return self._recording(function, inputs, self._shared[device])
