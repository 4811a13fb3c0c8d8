"""The compiled operators ``torch.ops.dn_detr_d2.*``: loading them, what PyTorch must know about them, and which to use.

The library ``_C.abi3.so`` (csrc/, built by setup.py) defines the operators and their kernels. This module adds the
gradients, the shapes for tracing and the autocast rule, and says for each device whether there is a kernel and if not, why.
"""

import functools
import logging
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("auto", "cuda", "cpu", "torch")
_REBUILD = "pip install --no-build-isolation -e . builds it"


def missing_kernel(device: str | torch.device) -> str:
    """Why there is no compiled kernel for tensors on a device, or a kind of device; "" if there is one.

    On a GPU also why the library has none for this one, without an index for the current one.
    """
    device = torch.device(device)
    reason = _MISSING.get(device.type, f"there are no kernels for {device.type} devices")
    return reason or (_missing_on_gpu(device.index) if device.type == "cuda" else "")


@torch.compiler.assume_constant_result
def _missing_on_gpu(index: int | None) -> str:
    """Why the library's CUDA kernels cannot run on a GPU; "" if they can, or if there is no GPU to ask."""
    if not torch.cuda.is_available():
        return ""
    return _no_code_for(torch.cuda.get_device_capability(index), _cuda_architectures())


def _cuda_architectures() -> str:
    """What the library was built for, such as "sm_80,sm_90,compute_90"; "" if it does not say, as those of before."""
    known = hasattr(torch.ops.dn_detr_d2, "cuda_architectures")
    return torch.ops.dn_detr_d2.cuda_architectures() if known else ""


@functools.cache
def _no_code_for(capability: tuple[int, int], built: str) -> str:
    """Why a library built for these architectures cannot run on a GPU of this capability; "" if it can or does not say.

    Machine code (sm_XY) runs on the same X and an equal or larger Y, with the suffix "f" too; with "a" on exactly X.Y. PTX
    (compute_XY) runs on whatever is not older; with "a" on exactly X.Y, with "f" on the same X. (CUDA C++ Programming
    Guide, "Compute Capabilities" and "Feature Set Compiler Targets".)
    """
    found = re.findall(r"\b(sm|compute)_(\d+)(\d)([af]?)\b", built)
    for kind, *version, suffix in found:
        major, minor = map(int, version)
        same_family = major == capability[0] and minor <= capability[1]
        fits = (major, minor) <= capability if kind == "compute" and not suffix else same_family
        if (major, minor) == capability if suffix == "a" else fits:
            return ""
    if not found:
        return ""
    major, minor = capability
    return (
        f"the compiled library has no code for this GPU, whose compute capability is {major}.{minor}: it was built for "
        f'{built}; TORCH_CUDA_ARCH_LIST="{major}.{minor}" {_REBUILD} anew'
    )


def kernel_is_broken(device_type: str) -> bool:
    """Whether there is a compiled library that cannot be used, which is worse than none."""
    reason = missing_kernel(device_type)
    return "does not load" in reason or "was built with PyTorch" in reason


def uses_kernel(backend: str, device: str | torch.device) -> bool:
    """Whether ``backend`` means the compiled kernel for tensors on a device.

    Args:
        backend: "auto" takes the kernel where there is one, else PyTorch's operators; "cuda" and "cpu" insist on the
            kernel; "torch" means PyTorch's operators.
        device: of the tensors, or its kind, such as "cpu".

    Raises:
        ValueError: an unknown backend, or one that is not there, or tensors on another device than it needs.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    kind, reason = torch.device(device).type, missing_kernel(device)
    if backend in ("cuda", "cpu"):
        if backend != kind:
            raise ValueError(f"backend {backend!r} needs tensors on {backend}, got {kind}")
        if reason:
            raise ValueError(f"backend {backend!r} is not available: {reason}")
    if not torch.compiler.is_compiling():
        _announce(backend, kind, reason)
    return backend != "torch" and not reason


def refuse_transforms(*tensors: Tensor) -> None:
    """Raises NotImplementedError where the operators would have no gradient.

    For tensors with a forward gradient, which they would drop without a word; and inside of torch.func.grad, vjp and what is
    made of them, where PyTorch's own sentence names no way out.
    """
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "ms_deform_attn has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad), nor has PyTorch's "
            "grid_sample; use reverse mode"
        )
    transforms = torch._C._functorch.get_interpreter_stack() or []
    if any(x.key() == torch._C._functorch.TransformType.Grad for x in transforms):
        raise NotImplementedError(
            "the compiled ms_deform_attn has no gradient under torch.func (grad, vjp, hessian); use backend 'torch' "
            "(MODEL.DN_DETR.OP_BACKEND torch), or loss.backward() and torch.autograd.grad"
        )


@functools.cache
def _announce(backend: str, device_type: str, missing: str) -> None:
    """Says once what was chosen, loudly if it is not what a user hopes for; ``missing``: why there is no kernel."""
    say = logging.getLogger(__name__)
    if backend != "torch" and not missing:
        detail = f" ({torch.ops.dn_detr_d2.cpu_capability()})" if device_type == "cpu" else ""
        say.info(f"ms_deform_attn on {device_type}: compiled kernel{detail}, backend {backend!r}")
    elif backend == "torch":
        say.info(f"ms_deform_attn on {device_type}: PyTorch's operators, as asked for")
    else:
        say.warning(
            f"ms_deform_attn on {device_type}: PyTorch's operators, several times slower than the compiled kernel, "
            f"because {missing}"
        )


def _load() -> dict[str, str]:
    """Loads the library and registers its operators; returns why each device has no kernel ("" if it has)."""
    folder = Path(__file__).resolve().parent.parent
    report = folder / "_build.txt"
    said = report.read_text().strip() if report.exists() else ""
    if said.startswith("no kernels were built"):  # a library that is there is older than the sources
        return dict.fromkeys(("cpu", "cuda"), f"at installation {said}")
    try:
        from .. import _C  # noqa: F401  loading it defines the operators
    except ImportError as error:
        if any(folder.glob("_C*.so")):  # built, but not for this PyTorch or this Python
            reason = f"the compiled library does not load ({error}); {_REBUILD} anew"
        elif said:
            reason = f"at installation {said}"
        else:
            reason = f"the compiled library {folder / '_C.abi3.so'} does not exist; {_REBUILD}"
        return {"cpu": reason, "cuda": reason}

    built_with, devices = torch.ops.dn_detr_d2.build_info().split("; ")
    if reason := _other_torch(built_with.removeprefix("torch "), torch.__version__):
        return {"cpu": reason, "cuda": reason}
    _register()
    left_out = said or "the library was built without CUDA"
    return {"cpu": "", "cuda": "" if "cuda" in devices else f"at installation {left_out}", "meta": ""}


def _other_torch(built: str, running: str) -> str:
    """Why a library built with one PyTorch must not run in another, "" if it may. The C++ interface changes with minors."""
    if built.split(".")[:2] == running.split(".")[:2]:
        return ""
    return f"the compiled library was built with PyTorch {built}, but {running} is running; {_REBUILD} anew"


def _register() -> None:
    library = torch.library.Library("dn_detr_d2", "IMPL")
    _KEEP.append(library)
    for name, fake in (
        ("ms_deform_attn", _fake_forward),
        ("ms_deform_attn_fused", _fake_fused),
        ("ms_deform_attn_backward", _fake_backward),
        ("ms_deform_attn_fused_backward", _fake_fused_backward),
    ):
        torch.library.register_fake(f"dn_detr_d2::{name}", fake)
        # The operators take any mixture of dtypes and sum in float32 or wider: autocast has nothing to cast, and must
        # not lower sampling locations, whose eight bits of bfloat16 would not tell the columns of a map apart.
        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(name, torch.library.fallthrough_kernel, key)
    register = torch.library.register_autograd
    register("dn_detr_d2::ms_deform_attn", _backward, setup_context=_save)
    register("dn_detr_d2::ms_deform_attn_fused", _fused_backward, setup_context=_save)
    register("dn_detr_d2::ms_deform_attn_backward", _no_second_derivative)
    register("dn_detr_d2::ms_deform_attn_fused_backward", _no_second_derivative)


def _save(ctx, inputs, output) -> None:
    value, ctx.spatial_shapes, *rest = inputs
    ctx.save_for_backward(value, *rest)


def _backward(ctx, grad_output: Tensor):
    value, locations, weights = ctx.saved_tensors
    grads = torch.ops.dn_detr_d2.ms_deform_attn_backward(grad_output, value, ctx.spatial_shapes, locations, weights)
    return grads[0], None, grads[1], grads[2]


def _fused_backward(ctx, grad_output: Tensor):
    value, reference, offsets, logits = ctx.saved_tensors
    needed = ctx.needs_input_grad[2]
    grads = torch.ops.dn_detr_d2.ms_deform_attn_fused_backward(
        grad_output, value, ctx.spatial_shapes, reference, offsets, logits, needed
    )
    return grads[0], None, grads[1] if needed else None, grads[2], grads[3]


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError(
        "the compiled ms_deform_attn has no second derivative; backend='torch' (MODEL.DN_DETR.OP_BACKEND torch) has one"
    )


def _fake_forward(value, spatial_shapes, locations, weights):
    n, _, h, d = value.shape
    return value.new_empty(n, locations.shape[1], h * d)


def _fake_fused(value, spatial_shapes, reference, offsets, logits):
    return _fake_forward(value, spatial_shapes, offsets, logits)


def _fake_backward(grad_output, value, spatial_shapes, locations, weights):
    return tuple(x.new_empty(x.shape) for x in (value, locations, weights))


def _fake_fused_backward(grad_output, value, spatial_shapes, reference, offsets, logits, reference_requires_grad):
    grad_reference = reference.new_empty(reference.shape if reference_requires_grad else (0,))
    return (
        value.new_empty(value.shape),
        grad_reference,
        offsets.new_empty(offsets.shape),
        logits.new_empty(logits.shape),
    )


_KEEP: list[torch.library.Library] = []  # a library's registrations end with it
_MISSING = _load()
