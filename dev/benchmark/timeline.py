"""What the parts of a detector cost in one pass, taken by hooks: time, dispatched operators, the floor, bytes kept.

The forward pass is divided by hooks on the parts. The backward pass is divided where the gradients of a part's outputs are
complete: from there on the backward pass is in that part. Losses come first, then decoder, queries, encoder, neck, backbone.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import fields, is_dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dev.benchmark_criterion import OperatorCount
from dn_detr_d2.diagnostics.model_analysis import KeptBytes
from dn_detr_d2.modeling.tensor_model import PARTS

FORWARD, BACKWARD, STEP = "forward", "backward", "step"
REST, LOSSES, MATCHER, GUARD, OPTIMIZER, OUTPUT = "rest", "losses", "matcher", "guard", "optimizer", "postprocess"
# Matrix products and convolutions, those of attention and of gradients among them: what any implementation has to compute.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "scaled_dot", "_scaled_dot")
CONVOLUTIONS = ("conv", "_convolution", "mkldnn_", "cudnn_conv", "_thnn")
FLOOR = tuple(f"aten.{name}" for name in PRODUCTS + CONVOLUTIONS)


class Meter(AbstractContextManager):
    """A quantity that grows while a pass runs; this one is the CPU time of the process, in milliseconds."""

    def __exit__(self, *_) -> None:
        """Nothing to undo."""

    def now(self):
        """A mark, cheap to take."""
        return time.process_time()

    def between(self, first, last) -> float:
        """How much it has grown from one mark to another, once the pass has ended."""
        return 1e3 * (last - first)


class WallTime(Meter):
    """Milliseconds of the clock on the wall, for several threads."""

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter()


class DeviceTime(Meter):
    """Milliseconds of the current CUDA stream."""

    def now(self) -> torch.cuda.Event:
        """An event of that stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """Waits for the second."""
        last.synchronize()
        return first.elapsed_time(last)


class Counted(Meter):
    """A number that a context counts while it is open.

    Args:
        context: with the number as its ``total``.
    """

    def __init__(self, context):
        self.context = context

    def __enter__(self) -> "Counted":
        self.context.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.context.__exit__(*error)

    def now(self) -> int:
        """So many until now."""
        return self.context.total

    def between(self, first: int, last: int) -> float:
        """A difference."""
        return last - first


def operators() -> Counted:
    """Dispatched operators, below autograd and autocast."""
    return Counted(OperatorCount())


def reads() -> Counted:
    """Calls that bring numbers of a tensor to Python: on a GPU the host waits there, if the tensor is not on the host."""
    return Counted(_CallsOf(("cpu", "tolist", "item", "__bool__", "__int__", "__float__", "__index__")))


def kept_bytes(model: nn.Module) -> Counted:
    """Bytes that autograd keeps for the backward pass, parameters left out."""
    return Counted(KeptBytes(model.parameters()))


class _CallsOf(TorchFunctionMode):
    """Counts calls of functions with these names."""

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        self.names, self.total = names, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Counts and passes on."""
        self.total += getattr(func, "__name__", "") in self.names
        return func(*args, **(kwargs or {}))


class _TimeOf(TorchDispatchMode):
    """Keeps the marks before and after each operator of :data:`FLOOR`."""

    def __init__(self, meter: Meter):
        super().__init__()
        self.meter, self.marks = meter, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Passes the operator on."""
        if not str(func).startswith(FLOOR):
            return func(*args, **(kwargs or {}))
        first = self.meter.now()
        result = func(*args, **(kwargs or {}))
        self.marks.append((first, self.meter.now()))
        return result

    @property
    def total(self) -> int:
        """How many there were until now."""
        return len(self.marks)


class Floor(Counted):
    """Milliseconds in the operators of :data:`FLOOR`.

    Args:
        meter: by which they are timed. On a GPU that waits for the host, its waits between two events count.
    """

    def __init__(self, meter: Meter):
        super().__init__(_TimeOf(meter))

    def between(self, first: int, last: int) -> float:
        """The sum of the times of the operators between two marks."""
        return sum(self.context.meter.between(*pair) for pair in self.context.marks[first:last])


def tensors_of(content) -> Iterator[Tensor]:
    """All tensors in dicts, sequences and dataclasses."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from tensors_of(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from tensors_of(value)
    elif is_dataclass(content):
        for entry in fields(content):
            yield from tensors_of(getattr(content, entry.name))


class _Matcher:
    """A matcher that tells a timeline when it works."""

    def __init__(self, matcher, timeline: "Timeline"):
        self._matcher, self._timeline = matcher, timeline

    def start(self, *given):
        """As the matcher's."""
        return self._timeline.within(MATCHER, self._matcher.start, *given)

    def finish(self, *given):
        """As the matcher's."""
        return self._timeline.within(MATCHER, self._matcher.finish, *given)


class Timeline:
    """Divides what a meter counts among the parts of a detector.

    Args:
        model: a :class:`~dn_detr_d2.modeling.DenoisingDETR`; it has hooks only while :meth:`costs` runs.
        meter: what is counted.
        optimizer: of a training step, None in inference.
    """

    def __init__(self, model: nn.Module, meter: Meter, optimizer: torch.optim.Optimizer | None = None):
        self.model, self.meter, self.optimizer = model, meter, optimizer
        self.parts = [name for name in PARTS if getattr(model, name) is not None]

    def costs(self, run: Callable[[], None]) -> dict[tuple[str, str], float]:
        """(part, pass) -> what one call of ``run`` adds to the meter there."""
        self._spans, self._arrivals, self._outer, self._known = [], [], [], set()
        with ExitStack() as stack, self.meter:
            for handle in self._hooks():
                stack.callback(handle.remove)
            matcher, self.model.matcher = self.model.matcher, _Matcher(self.model.matcher, self)
            stack.callback(setattr, self.model, "matcher", matcher)
            self._label, self._since = (REST, FORWARD), self.meter.now()
            run()
            self._switch(None)
        result = defaultdict(float)
        for label, first, last in self._spans:
            result[label] += self.meter.between(first, last)
        return dict(result)

    def within(self, part: str, function: Callable, *given):
        """Calls ``function`` and counts it as ``part``."""
        self._enter(part)
        result = function(*given)
        self._leave()
        return result

    def _hooks(self) -> Iterator:
        yield self.model.register_forward_pre_hook(lambda *_: self._switch((REST, FORWARD)))
        yield self.model.register_forward_hook(lambda *_: self._end_forward())
        for name in self.parts:
            part = getattr(self.model, name)
            yield part.register_forward_pre_hook(partial(lambda name, *_: self._enter(name), name))
            yield part.register_forward_hook(partial(lambda name, *given: self._end_part(name, given[-1]), name))
        if self.optimizer is not None:
            yield self.optimizer.register_step_pre_hook(lambda *_: self._switch((OPTIMIZER, STEP)))
            yield self.optimizer.register_step_post_hook(lambda *_: self._switch((REST, STEP)))

    def _switch(self, label: tuple[str, str] | None) -> None:
        """What follows is counted as ``label``."""
        now = self.meter.now()
        self._spans.append((self._label, self._since, now))
        self._label, self._since = label, now

    def _enter(self, part: str) -> None:
        self._outer.append(self._label)
        self._switch((part, FORWARD))

    def _leave(self) -> None:
        self._switch(self._outer.pop())

    def _end_part(self, name: str, output) -> None:
        self._leave()
        if name == "decoder":
            self._label = (LOSSES if self.model.training else OUTPUT, FORWARD)
        if torch.is_grad_enabled():
            new = [x for x in tensors_of(output) if x.grad_fn is not None and id(x) not in self._known]
            self._known |= {id(x) for x in new}
            for tensor in new:
                tensor.register_hook(partial(self._arrive, name, tensor.grad_fn._sequence_nr()))

    def _end_forward(self) -> None:
        self._switch((LOSSES, BACKWARD) if self.model.training else (REST, FORWARD))

    def _arrive(self, name: str, order: int, gradient: Tensor) -> None:
        """The gradient of an output of a part is complete.

        Autograd computes what was made last first, so the backward pass of a part begins at the last of its outputs;
        another one that its own layers read too, such as position encodings, is complete only when they are done.
        """
        if not self._arrivals:
            Variable._execution_engine.queue_callback(self._end_backward)
        self._arrivals.append((name, order, self.meter.now()))

    def _end_backward(self) -> None:
        """Divides the backward pass where the gradient of each part's last output was complete."""
        end, begins = self.meter.now(), {}
        for name, _, mark in sorted(self._arrivals, key=lambda arrival: arrival[1]):
            begins[name] = mark
        part, since = LOSSES, self._since
        for name in reversed(self.parts):
            if name in begins:
                self._spans.append(((part, BACKWARD), since, begins[name]))
                part, since = name, begins[name]
        self._spans.append(((part, BACKWARD), since, end))
        self._label, self._since, self._arrivals = (GUARD, STEP), end, []
