"""The trainer: Detectron2's, with our training step, hooks and checkpoints."""

import logging
import math
import sys
import weakref
import zlib
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from .. import data
from ..checkpoint import EMA
from ..checkpoint.checkpointer import Checkpointer, load_weights
from ..checkpoint.resume import must_fit, pointed_checkpoint
from ..data.interruption import Interrupted, agree, interruptible
from ..data.loader import resumes_order
from ..diagnostics import MeasuringHook, build_diagnostics, check_diagnostics
from ..errors import CheckpointError, ConfigError
from ..evaluation import build_evaluator, main_metric
from ..inference import accelerated, prepared, settle
from ..tiling import with_tiles
from ..utils.distributed import device_of, unwrap
from ..utils.precision import dtype_of
from ..utils.processor import slow_bfloat16
from ..utils.rng import isolated_rng
from ..utils.text_output import escape_unwritable
from . import optimizer
from .extras import check_extras
from .freezing import freeze_parts
from .hooks.checkpoint import BestCheckpointer, CheckpointHook, MetricPrinter, ShortHistory
from .hooks.early_stopping import EarlyEnd, EarlyStopping, require_evaluations
from .hooks.ema import AverageHook, average_weights
from .hooks.graceful_stop import LeaveHook, StopHook, StopRequest, leave_training
from .hooks.noise_schedule import NoiseSchedule
from .hooks.progress import ProgressBar
from .hooks.repeat_evaluation import EvaluationRecord, RepeatEvaluation
from .hooks.settle import SettleHook
from .loggers import build_loggers
from .semi_supervised import SemiSupervisedStep, semi_supervised_options
from .train_step import TrainStep
from .training_state import capture_training_state, restore_training_state

logger = logging.getLogger(__name__)

WRITER_PERIOD = 20  # iterations between two lines of metrics, as in Detectron2
MEASURING = (hooks.EvalHook, MeasuringHook)  # hooks that only read the model, so they may be interrupted


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer for DETRs; runs on GPUs over NCCL and in CPU processes over gloo.

    Args:
        cfg: a complete config, see :func:`dn_detr_d2.setup_cfg`.
        stop_request: one whose handlers are installed already; otherwise they are installed by :meth:`train`.
    """

    def __init__(self, cfg, stop_request: StopRequest | None = None):
        escape_unwritable("detectron2", "fvcore", "dn_detr_d2")
        TrainerBase.__init__(self)  # DefaultTrainer's own __init__ is written for GPUs only
        self.stop_request = stop_request or StopRequest()
        check_extras(cfg)
        check_hooks(cfg)
        cfg = scaled_to_workers(cfg, comm.get_world_size())
        if cfg.MODEL.DN_DETR.MASK.ENABLED:
            for name in cfg.DATASETS.TEST:  # or what cannot be evaluated would end the training at its first evaluation
                self.build_evaluator(cfg, name)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        devices = {} if next(model.parameters()).is_cuda else {"device_ids": None}
        node = cfg.MODEL_EMA
        self.averaged = average_weights(model, node.DECAY, node.WARMUP) if node.ENABLED else None
        model = create_ddp_model(model, broadcast_buffers=False, **devices)
        amp_dtype = dtype_of(cfg.SOLVER.AMP.DTYPE) if cfg.SOLVER.AMP.ENABLED else None
        if amp_dtype is torch.bfloat16 and next(model.parameters()).is_cpu and (reason := slow_bfloat16()):
            logger.warning("%s; SOLVER.AMP.ENABLED False trains faster here", reason)
        reports = str(Path(cfg.OUTPUT_DIR) / "nan_report")
        may_skip = cfg.SOLVER.NONFINITE_LIMIT if cfg.SOLVER.NONFINITE == "skip" else 0
        options = {"may_skip": may_skip, "accumulation": cfg.SOLVER.ACCUMULATION_STEPS}
        if cfg.SEMI_SUPERVISED.ENABLED:
            options |= semi_supervised_options(cfg, self.averaged.module)
        step = SemiSupervisedStep if cfg.SEMI_SUPERVISED.ENABLED else TrainStep
        self._trainer = step(model, loader, optimizer, amp_dtype, reports, **options)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.device = next(model.parameters()).device
        self.loggers, self._runs = build_loggers(cfg), {}
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            cfg=cfg,
            new_classes=True,
            training_state=partial(capture_training_state, loader, self.device, self.loggers),
            trainer=weakref.proxy(self),
            **({EMA: self.averaged} if self.averaged else {}),
        )
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; resuming also restores the order of images and the RNG states."""
        wanted = self._rates()
        saved = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resuming:
            self._warn_of_other_rates(wanted)
            self.start_iter = self.iter + 1
            with must_fit(self.checkpointer.found):
                restore_training_state(saved, self._trainer.data_loader, self.start_iter, self.device, self.cfg.SEED)
            self._runs = saved.get("logger_runs") or {}
        if self.averaged and not self.averaged.n_averaged:  # also of a checkpoint without an average
            self.averaged.module.load_state_dict(unwrap(self.model).state_dict())

    def _rates(self) -> dict[str, list[float]]:
        """What a checkpoint brings along, in place of the config's."""
        groups = self._trainer.optimizer.param_groups
        return {
            "SOLVER.BASE_LR": list(self.scheduler.base_lrs),
            "SOLVER.WEIGHT_DECAY": [x["weight_decay"] for x in groups],
        }

    def _warn_of_other_rates(self, wanted: dict[str, list[float]]) -> None:
        for key, found in self._rates().items():
            pairs = enumerate(zip(found, wanted[key], strict=True))
            for i, (theirs, ours) in [x for x in pairs if not math.isclose(*x[1], rel_tol=1e-6)][:1]:
                logger.warning(
                    "the training goes on with the %s of its checkpoint, %g, not with that of the config, %g (parameter "
                    "group %d); for another one start anew with the checkpoint as MODEL.WEIGHTS",
                    *(key, theirs, ours, i),
                )

    def build_hooks(self) -> list:
        """Detectron2's hooks with our checkpoints; after an evaluation the best one and the diagnostics."""
        cfg = self.cfg
        found = [hook for hook in super().build_hooks() if not isinstance(hook, hooks.PeriodicCheckpointer)]
        period, metrics = cfg.TEST.EVAL_PERIOD, best_metrics(cfg)
        burn_in = cfg.SEMI_SUPERVISED.BURN_IN if cfg.SEMI_SUPERVISED.ENABLED else 0
        averages = [AverageHook(self.averaged, unwrap(self.model), burn_in)] if self.averaged else []
        added = [hooks.EvalHook(period, self.test_averaged)] if self.averaged else []
        added += [BestCheckpointer(period, self.checkpointer, metric) for metric in metrics] + build_diagnostics(cfg)
        evaluation = next(i for i, hook in enumerate(found) if isinstance(hook, hooks.EvalHook))
        record = EvaluationRecord(cfg.OUTPUT_DIR, period)
        evaluating = [found[evaluation], *added, record]
        found[evaluation + 1 : evaluation + 1] = evaluating[1:]
        # Two measurements between two writes would leave the later one alone in the logs.
        writing = min(x for x in (WRITER_PERIOD, period, cfg.TEST.INSTABILITY.PERIOD) if x > 0)
        for writer in (hook for hook in found if isinstance(hook, hooks.PeriodicWriter)):
            writer._period = writing
        stop = StopHook(self.stop_request)
        settling = SettleHook((cfg.SOLVER.CHECKPOINT_PERIOD, period, cfg.TEST.INSTABILITY.PERIOD, writing), stop)
        checkpoints = self._checkpoints = CheckpointHook(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, stop)
        found[evaluation:evaluation] = [checkpoints, LeaveHook(stop)]
        node, ends = cfg.SOLVER.EARLY_STOPPING, []
        if node.PATIENCE:
            ends = [EarlyStopping(self.checkpointer, period, metrics, node.PATIENCE, node.MIN_DELTA, burn_in)]
        noise = cfg.MODEL.DN_DETR.DENOISING.NOISE_SCHEDULE
        schedule = NoiseSchedule(noise.NAME, noise.START, noise.END)
        self._progress = ProgressBar(cfg.PROGRESS_BAR)
        return [
            stop,
            schedule,
            ShortHistory(),
            *averages,
            settling,
            *found,
            *ends,
            RepeatEvaluation(record, [*evaluating, *ends]),
            self._progress,
        ]

    def build_writers(self) -> list:
        """Detectron2's, with our printer instead of the first, its own, and those of LOGGERS."""
        return [MetricPrinter(self.max_iter), *super().build_writers()[1:], *self.loggers]

    def train(self):
        """As Detectron2's; SIGTERM and SIGUSR1 end it with a checkpoint and SystemExit(75), early stopping without."""
        self.stop_request.listen()
        try:
            self._start_loggers()
            with (
                interruptible(self.stop_request.anywhere, self.stop_request.raising),
                self._progress.shown(self.start_iter, self.max_iter),
            ):
                return super().train()
        except EarlyEnd:
            return getattr(self, "_last_eval_results", None)
        except Interrupted:
            self._leave_interrupted()
        finally:
            self.stop_request.release()

    def _start_loggers(self) -> None:
        """Starts or resumes the runs; their packages leave the random streams of the training alone."""
        with isolated_rng(0, self.device):
            for writer in self.loggers:
                writer.start(str(self._runs.get(writer.name, "")))

    def _leave_interrupted(self) -> None:
        """Exits with the checkpoint of the last step, which may not have been written before the interrupted evaluation."""
        last = min(self.iter, self.max_iter - 1)
        if self._checkpoints.saved != last and self.iter == last:
            self.checkpointer.save(f"model_{last:07d}", iteration=last)
        leave_training(self.stop_request.received or "another process was asked to stop", last + 1)

    def after_step(self) -> None:
        """As Detectron2's; a request to stop interrupts an evaluation."""
        for hook in self._hooks:
            with self._until_asked(hook):
                hook.after_step()

    def _until_asked(self, hook):
        """A signal may raise in hooks that measure, not in those that write files or change the model."""
        return self.stop_request.interruptible() if isinstance(hook, MEASURING) else nullcontext()

    def after_train(self) -> None:
        """As Detectron2's; after an error or a stop only the writers finish: other ranks may have exited.

        After early stopping too: everything has just been evaluated and written.
        """
        # Detectron2 counts one more even where a training that has ended is resumed, and nothing is left to train.
        self.iter = self.storage.iter = min(self.iter, max(self.start_iter, self.max_iter))
        cut_off = sys.exc_info()[0]
        if cut_off is not None:
            self._trainer.close()
        for hook in self._hooks:
            try:
                with self._until_asked(hook):
                    if cut_off is None:
                        hook.after_train()
                    elif isinstance(hook, hooks.PeriodicWriter):
                        self._finish(hook)
            except Interrupted as error:
                cut_off = error
        if isinstance(cut_off, Interrupted):
            raise cut_off

    @staticmethod
    def _finish(writer: hooks.PeriodicWriter) -> None:
        try:
            writer.after_train()
        except OSError as error:  # a full disk, say, must not hide why the training ends
            logger.warning("the last metrics were not written: %s", error)

    @classmethod
    def test(cls, cfg, model, evaluators=None) -> dict:
        """As Detectron2's; the RNG states of the training are preserved."""
        with isolated_rng(0, device_of(model)), accelerated(unwrap(model), cfg):
            results = super().test(cfg, with_tiles(prepared(model, cfg), cfg), evaluators)
        if cfg.DATASETS.TEST:
            agree()
        return results

    def test_averaged(self) -> dict:
        """Evaluates the averaged weights; results are named ``ema/...`` and go to OUTPUT_DIR/ema/inference."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / "ema")
        return {"ema": self.test(cfg, self.averaged.module)}

    @classmethod
    def build_model(cls, cfg) -> nn.Module:
        """The model of the config, in training mode, with its size in the log."""
        from detectron2.modeling import build_model

        model = build_model(cfg)
        freeze_parts(model, cfg.MODEL.FREEZE)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        logger.debug("Model:\n%s", model)
        logger.info("Model: %.2f M parameters, %.2f M trainable, on %s", total / 1e6, trainable / 1e6, cfg.MODEL.DEVICE)
        return model

    @classmethod
    def build_optimizer(cls, cfg, model):
        """See :func:`dn_detr_d2.engine.optimizer.build_optimizer`."""
        return optimizer.build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg, optim):
        """See :func:`dn_detr_d2.engine.optimizer.build_lr_scheduler`."""
        return optimizer.build_lr_scheduler(cfg, optim)

    @classmethod
    def build_train_loader(cls, cfg):
        """See :func:`dn_detr_d2.data.build_train_loader`."""
        with nullcontext() if resumes_order(cfg) else _order_after(cfg):
            return data.build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        """See :func:`dn_detr_d2.data.build_test_loader`."""
        return data.build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name) -> DatasetEvaluator:
        """See :func:`dn_detr_d2.evaluation.build_evaluator`."""
        return build_evaluator(cfg, dataset_name)


def _order_after(cfg):
    """A context whose random numbers are of the checkpoint that is resumed: after each the images come in another order.

    Detectron2 draws the seed of a sampler right after the random streams were seeded, so that each resume would see the
    same images first, and the last ones never.
    """
    try:
        checkpoint = Path(pointed_checkpoint(cfg.OUTPUT_DIR)).name
    except CheckpointError:  # which is passed over, or refused, where it is loaded
        checkpoint = ""
    return isolated_rng(zlib.crc32(f"{cfg.SEED} {checkpoint}".encode())) if checkpoint else nullcontext()


def scaled_to_workers(cfg, num_workers: int):
    """Detectron2's ``auto_scale_workers``, which scales iterations with SOLVER.REFERENCE_WORLD_SIZE; those of ours too.

    Raises:
        ConfigError: the batch cannot be divided among the workers that it is meant for.
    """
    images, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference and images % reference:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH = {images} is not divisible by SOLVER.REFERENCE_WORLD_SIZE = {reference}; set the latter "
            "to the number of processes that the batch is meant for, or to 0"
        )
    scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
    if scaled.SOLVER.MAX_ITER != cfg.SOLVER.MAX_ITER:
        scaled = scaled.clone()
        scaled.defrost()
        share = scaled.SOLVER.MAX_ITER / cfg.SOLVER.MAX_ITER
        scaled.SEMI_SUPERVISED.BURN_IN = round(cfg.SEMI_SUPERVISED.BURN_IN * share)
        scaled.TEST.INSTABILITY.PERIOD = math.ceil(cfg.TEST.INSTABILITY.PERIOD * share)
        scaled.freeze()
    return scaled


def check_hooks(cfg) -> None:
    """Raises ConfigError for hooks of :meth:`Trainer.build_hooks` that cannot work with the rest of the config."""
    check_diagnostics(cfg)
    if patience := cfg.SOLVER.EARLY_STOPPING.PATIENCE:
        require_evaluations(cfg.TEST.EVAL_PERIOD, best_metrics(cfg), patience)


def best_metrics(cfg) -> list[str]:
    """Names under which d2's EvalHook logs :func:`.main_metric`, of the weights and of their average.

    Of several test sets, the first.
    """
    if not cfg.DATASETS.TEST:
        return []
    metric = main_metric(cfg)
    name = metric if len(cfg.DATASETS.TEST) == 1 else f"{cfg.DATASETS.TEST[0]}/{metric}"
    return [name, f"ema/{name}"] if cfg.MODEL_EMA.ENABLED else [name]


def load_for_evaluation(cfg) -> nn.Module:
    """The model of the config with all of MODEL.WEIGHTS, or of their moving average.

    Raises:
        CheckpointError: see :func:`~dn_detr_d2.checkpoint.checkpointer.load_weights`.
    """
    model = Trainer.build_model(cfg).eval()
    load_weights(model, cfg)
    return model


def evaluate(cfg) -> dict:
    """Evaluates MODEL.WEIGHTS on DATASETS.TEST; returns Detectron2's results."""
    escape_unwritable("detectron2", "fvcore", "dn_detr_d2")
    model = load_for_evaluation(cfg)
    settle(model, cfg)
    return Trainer.test(cfg, model)
