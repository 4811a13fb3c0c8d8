"""The optimizer: parameter groups from one table of name patterns, clipping of the whole model's gradient, and schedules."""

import logging
from collections.abc import Iterable

import torch
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver import build_lr_scheduler as build_other_scheduler
from detectron2.solver.build import maybe_add_gradient_clipping
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# (part of a parameter's name, the SOLVER key that multiplies its learning rate); the first match counts.
LEARNING_RATE_TABLE = (
    ("backbone.", "BACKBONE_MULTIPLIER"),
    # As Deformable DETR's `lr_linear_proj_names`: sampling offsets, and the linear layer that gives the reference points.
    ("sampling_offsets.", "SAMPLING_MULTIPLIER"),
    ("query_source.reference.", "SAMPLING_MULTIPLIER"),
)
# Detectron2's R-CNN recipes have 0.02, for SGD; no published DETR has more than 2e-4.
LARGE_FOR_ADAMW = 0.01
# Mask2Former keeps this one as a bare parameter and gives only modules for embeddings a weight decay of their own. Swin's
# table is a bare parameter too, but goes with the embeddings.
DECAYING_EMBEDDING = "encoder.level_embed.weight"
POSITION_BIAS = "relative_position_bias_table"
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def parameter_groups(cfg, model: nn.Module) -> list[dict]:
    """Trainable parameters by learning rate and weight decay, each parameter once.

    Weight decay is ``SOLVER.WEIGHT_DECAY``, for norms ``WEIGHT_DECAY_NORM``, for biases and embeddings ``WEIGHT_DECAY_BIAS``
    and ``WEIGHT_DECAY_EMBED`` (null = the same). Learning rates follow :data:`LEARNING_RATE_TABLE`.
    """
    solver, groups, seen = cfg.SOLVER, {}, set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            key = next((key for part, key in LEARNING_RATE_TABLE if part in name), None)
            rate = solver.BASE_LR * (solver[key] if key else 1.0)
            decay = _weight_decay(solver, module, name)
            group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())


def _weight_decay(solver, module: nn.Module, name: str) -> float:
    if isinstance(module, NORMS):
        return solver.WEIGHT_DECAY_NORM
    decay = solver.WEIGHT_DECAY_BIAS if name.endswith(".bias") else None
    if (isinstance(module, nn.Embedding) and name != DECAYING_EMBEDDING) or name.endswith(POSITION_BIAS):
        decay = solver.WEIGHT_DECAY_EMBED
    return solver.WEIGHT_DECAY if decay is None else decay


def build_optimizer(cfg, model: nn.Module) -> torch.optim.Optimizer:
    """``SOLVER.OPTIMIZER`` over :func:`parameter_groups`, clipped as ``SOLVER.CLIP_GRADIENTS`` says.

    All are PyTorch's fused ones: faster, and able to leave out a step on the device, see :func:`step_unless`.
    """
    groups = parameter_groups(cfg, model)
    for group in groups:
        logger.info(
            "Optimizer group: %d tensors, %.3f M parameters, learning rate %.3g, weight decay %.3g",
            len(group["params"]),
            sum(p.numel() for p in group["params"]) / 1e6,
            group["lr"],
            group["weight_decay"],
        )
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    kind, clipped, settings = torch.optim.AdamW, ClippedAdamW, {"lr": solver.BASE_LR}
    if solver.OPTIMIZER == "SGD":
        kind, clipped = torch.optim.SGD, ClippedSGD
        settings |= {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    elif solver.BASE_LR >= LARGE_FOR_ADAMW:
        logger.warning(
            "SOLVER.BASE_LR = %g is large for AdamW; a recipe of SGD needs SOLVER.OPTIMIZER SGD", solver.BASE_LR
        )
    if clip.ENABLED and clip.CLIP_TYPE != "full_model":
        return maybe_add_gradient_clipping(cfg, kind)(groups, fused=True, **settings)
    if not clip.ENABLED:
        return kind(groups, fused=True, **settings)
    return clipped(groups, max_norm=clip.CLIP_VALUE, norm_type=clip.NORM_TYPE, **settings)


def build_lr_scheduler(cfg, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """That of ``SOLVER.LR_SCHEDULER_NAME``: one of Detectron2's, or DeepLab's "WarmupPolyLR".

    A warning says so where the training is over before its warm-up is: the latter leads to the rate that the schedule has at
    its end, which is 0 for most.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupPolyLR":
        scheduler = build_other_scheduler(cfg, optimizer)
    else:
        warmup = (solver.WARMUP_FACTOR, min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0), solver.WARMUP_METHOD)
        decay = PolynomialDecayParamScheduler(1.0, solver.POLY_LR_POWER)
        multiplier = WarmupParamScheduler(decay, *warmup, solver.RESCALE_INTERVAL)
        scheduler = LRMultiplier(optimizer, multiplier, solver.MAX_ITER)
    if solver.WARMUP_ITERS >= solver.MAX_ITER:
        _warn_of_warmup(solver, scheduler)
    return scheduler


def _warn_of_warmup(solver, scheduler: LRMultiplier) -> None:
    """Says how far the rate of a training gets that is all warm-up."""
    factors = (scheduler._multiplier(i / solver.MAX_ITER) for i in range(solver.MAX_ITER))
    logger.warning(
        "SOLVER.WARMUP_ITERS = %d is not below SOLVER.MAX_ITER = %d: the learning rate never exceeds %.2g of SOLVER."
        "BASE_LR; lower WARMUP_ITERS with MAX_ITER",
        solver.WARMUP_ITERS,
        solver.MAX_ITER,
        max(factors),
    )


class ClipsWholeModel:
    """Scales all gradients together before each step so that their joint norm is at most ``max_norm``.

    Stands before an optimizer of ``torch.optim`` in the order of inheritance. The fused implementations are several times
    faster on a CPU. They let a GradScaler leave gradients scaled, so with fp16 ``scaler.unscale_(optimizer)`` must come
    before the step, as in ``engine.TrainStep``.

    Args:
        parameters: as for the optimizer.
        lr: learning rate of groups that have none.
        max_norm: largest joint norm.
        norm_type: order of the norm.
        settings: of the optimizer.
    """

    def __init__(self, parameters: Iterable, lr: float, *, max_norm: float, norm_type: float = 2.0, **settings):
        super().__init__(parameters, lr, fused=True, **settings)
        self.max_norm, self.norm_type = max_norm, norm_type

    def step(self, closure=None, *, norm: Tensor | None = None):
        """Clips, then steps.

        Args:
            closure: as for the optimizer.
            norm: the 2-norm of all gradients if it is known, see :func:`total_norm`.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        if norm is None or self.norm_type != 2.0:
            norm = total_norm(self, self.norm_type)
        torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        return super().step(closure)


class ClippedAdamW(ClipsWholeModel, torch.optim.AdamW):
    """AdamW with :class:`ClipsWholeModel`."""


class ClippedSGD(ClipsWholeModel, torch.optim.SGD):
    """Stochastic gradient descent with :class:`ClipsWholeModel`."""


def total_norm(optimizer: torch.optim.Optimizer, norm_type: float = 2.0) -> Tensor:
    """The joint norm of the gradients of all parameters of an optimizer, () on their device."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, norm_type)


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether :func:`step_unless` works with an optimizer: a fused one of PyTorch.

    Not with dampening: the first step of SGD takes the gradient for its momentum, whatever the dampening is, and only the
    device knows which step is the first that is taken. Not with groups that a checkpoint of an unfused optimizer has set.
    """
    groups = optimizer.param_groups
    fused = getattr(optimizer, "_step_supports_amp_scaling", False) and all(group.get("fused") for group in groups)
    return fused and not any(group.get("momentum") and group.get("dampening") for group in groups)


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor, **known) -> None:
    """A step that the device leaves out, with all of the optimizer's state, where ``skip`` is 1; nothing waits.

    Args:
        optimizer: see :func:`skips_on_device`.
        skip: () float32 on the device of the parameters, 0 or 1.
        known: for its ``step``.
    """
    for group in optimizer.param_groups:
        if group.get("momentum"):  # SGD would leave the buffers of a first step that is left out uninitialised
            for parameter in group["params"]:
                state = optimizer.state[parameter] if parameter.grad is not None else None
                if state is not None and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)  # then momentum * 0 + gradient
    optimizer.found_inf = skip  # as torch.amp.GradScaler tells a fused optimizer
    try:
        optimizer.step(**known)
    finally:
        del optimizer.found_inf
