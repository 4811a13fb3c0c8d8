"""``torch.use_deterministic_algorithms(True)`` must find nothing to object to in a training step on a GPU.

No GPU is needed: the step runs on the CPU, and its operators are those that would be looked up on a GPU.
"""

import pytest
import torch
from conftest import SYSTEMS, make_batch
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode

from dn_detr_d2.denoising.label_noise import ClassFrequency, Confusion

# Without a deterministic CUDA kernel (torch.use_deterministic_algorithms), as far as a detector might use them.
LACKING = (
    "_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "avg_pool3d_backward", "grid_sampler_2d_backward",
    "histc", "kthvalue", "max_pool3d_with_indices_backward", "median", "nll_loss2d_backward", "nll_loss2d_forward", "put_",
    "reflection_pad2d_backward", "replication_pad2d_backward", "scatter_reduce", "upsample_bicubic2d_backward",
    "upsample_linear1d_backward",
)  # fmt: skip
LACKING_FOR_FLOATS = ("cumsum", "cumprod", "logcumsumexp")


class Operators(TorchDispatchMode):
    """Names of the dispatched operators without a deterministic CUDA kernel."""

    def __init__(self):
        super().__init__()
        self.lacking, self.seen = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.name().split("::")[1].split(".")[0]
        self.seen.add(name)
        if name in LACKING or (name in LACKING_FOR_FLOATS and result.is_floating_point()):
            self.lacking.add(name)
        return result


@pytest.mark.parametrize("name", LACKING + LACKING_FOR_FLOATS)
def test_the_operators_of_the_list_exist(name):
    assert hasattr(torch.ops.aten, name)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_operator_of_a_training_step_has_a_deterministic_cuda_kernel(toy_model, system):
    model = toy_model(system).train()
    with EventStorage(), Operators() as operators:
        sum(model(make_batch(3, 1)).values()).backward()
    assert operators.lacking == set()
    assert {"cumsum", "convolution_backward"} <= operators.seen


@pytest.mark.parametrize(
    "kind", [ClassFrequency([3, 1, 0, 2, 5]), Confusion([[1] * 5] * 5)], ids=["frequency", "confusion"]
)
def test_label_noise_by_weights_has_too(toy_model, kind):
    model = toy_model("dn_detr").train()
    model.denoising.generator.label_noise = kind
    with EventStorage(), Operators() as operators:
        sum(model(make_batch(3, 1)).values()).backward()
    assert operators.lacking == set()
    assert "searchsorted" in operators.seen
