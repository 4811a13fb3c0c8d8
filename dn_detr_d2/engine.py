"""Training and evaluation on Detectron2's engine: the trainer, its step, and the hooks that differ."""

import logging
import math
import sys
import time
import weakref
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from detectron2.engine import DefaultTrainer, SimpleTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from . import data, solver
from .coco import NUM_RAW_CLASSES, RAW_IDS, raw_names
from .errors import ConfigError, DatasetError
from .evaluation import build_instruments
from .randomness import own_randomness
from .training import (
    BestCheckpointer,
    Checkpointer,
    CheckpointHook,
    LeaveHook,
    MetricPrinter,
    ShortHistory,
    StopHook,
    StopRequest,
    progress,
    take_up,
)

logger = logging.getLogger(__name__)

NORM = "gradient_norm"
AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class TrainStep(SimpleTrainer):
    """One training iteration on any device, with or without mixed precision.

    The weights never see a loss or a gradient that is not finite: the step is left before the optimizer, on all ranks, all
    loss terms having been read in one transfer. The error names the first bad term and the image files; the batch is written
    to ``dump_folder``.

    Args:
        model, data_loader, optimizer: as for SimpleTrainer.
        amp_dtype: autocast precision, None = float32.
        dump_folder: where the batch of a failed step goes.
    """

    def __init__(self, model, data_loader, optimizer, amp_dtype: torch.dtype | None, dump_folder: str):
        super().__init__(model, data_loader, optimizer)
        self.amp_dtype, self.dump_folder = amp_dtype, Path(dump_folder)
        self.device_type = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=amp_dtype is torch.float16)

    def run_step(self) -> None:
        """Forward, backward, check, step."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        try:
            with torch.autocast(self.device_type, self.amp_dtype, enabled=self.amp_dtype is not None):
                losses = self.model(batch)
        except FloatingPointError as error:
            raise self._failure(batch, str(error)) from error

        terms = torch.stack(list(losses.values()))
        self.optimizer.zero_grad()
        self.scaler.scale(terms.sum()).backward()
        self.scaler.unscale_(self.optimizer)  # before the optimizer clips; a no-op unless fp16
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        *values, norm = torch.cat([terms.detach(), norm[None]]).tolist()  # one transfer for all
        values = {**dict(zip(losses, values, strict=True)), NORM: norm}
        everyone = comm.all_gather({"data_time": data_time, **values})
        self._check(batch, everyone)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._record(everyone)

    def _check(self, batch: list[dict], everyone: list[dict[str, float]]) -> None:
        """Raises on every rank if a loss, or a gradient that no scaler watches over, is not finite on any."""
        watched = {NORM} if self.scaler.is_enabled() else set()
        for rank, values in enumerate(everyone):
            bad = [name for name, value in values.items() if name not in watched and not math.isfinite(value)]
            if bad and rank == comm.get_rank():
                raise self._failure(batch, f"{'' if bad[0] == NORM else 'loss term '}{bad[0]} is {values[bad[0]]}")
            if bad:
                raise FloatingPointError(
                    f"iteration {self.iter}: on rank {rank} {bad[0]} is {values[bad[0]]}; see its error"
                )

    def _failure(self, batch: list[dict], what: str) -> FloatingPointError:
        """Writes the batch and returns the error to raise."""
        self.dump_folder.mkdir(parents=True, exist_ok=True)
        path = self.dump_folder / f"iteration_{self.iter}_rank_{comm.get_rank()}.pth"
        names = [x.get("file_name", "unnamed") for x in batch]
        torch.save([{k: _plain(v) for k, v in x.items()} for x in batch], path)
        return FloatingPointError(
            f"iteration {self.iter}, rank {comm.get_rank()}: {what}; images: {', '.join(names)}; the batch is in {path}. "
            "No weight has been changed by it. Look at the images and boxes, lower SOLVER.BASE_LR, or use bf16 for fp16"
        )

    def _record(self, everyone: list[dict[str, float]]) -> None:
        """Logs every term under its name, and the sums of the groups main / aux / dn for the console."""
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        means = {name: sum(rank[name] for rank in everyone) / len(everyone) for name in everyone[0]}
        means["data_time"] = max(rank["data_time"] for rank in everyone)
        groups = {}
        for name, value in means.items():
            if "/" in name:
                group = f"loss_{name.split('/')[0]}"
                groups[group] = groups.get(group, 0.0) + value
        storage.put_scalars(total_loss=sum(groups.values()), **groups, **means)

    def state_dict(self) -> dict:
        """Adds the gradient scaler's state."""
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Counterpart of :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        if state := state_dict.get("scaler"):  # empty when the checkpoint was trained without fp16
            self.scaler.load_state_dict(state)


def _plain(value):
    """Instances as a dict of tensors, so that the dump loads with ``weights_only=True``."""
    if hasattr(value, "get_fields"):
        fields = {k: getattr(v, "tensor", v) for k, v in value.get_fields().items()}
        return {"image_size": tuple(value.image_size), **fields}
    return value


class TolerantCOCOEvaluator(COCOEvaluator):
    """COCO's AP on files that leave out what detection does not need.

    Annotations without ``area`` or ``iscrowd`` get width * height and 0, and ids are counted from 1: pycocotools takes the
    id 0 for "not matched" and would count a hit as a miss.

    Args:
        args, kwargs: as for COCOEvaluator.
        raw_ids: the model predicts COCO's 91 raw ids; detections of unused ids are left out.
    """

    def __init__(self, *args, raw_ids: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self._contiguous = None
        if raw_ids:
            self._contiguous = torch.full((NUM_RAW_CLASSES,), -1)
            self._contiguous[list(RAW_IDS)] = torch.arange(len(RAW_IDS))
        annotations = self._coco_api.dataset.get("annotations", [])
        for i, annotation in enumerate(annotations, 1):
            width, height = annotation["bbox"][2:]
            annotation.update(id=i, area=annotation.get("area", width * height), iscrowd=annotation.get("iscrowd", 0))
        self._coco_api.createIndex()

    def process(self, inputs, outputs) -> None:
        """Takes the detections of a batch."""
        if self._contiguous is not None:
            outputs = [self._make_contiguous(output["instances"].to("cpu")) for output in outputs]
        super().process(inputs, outputs)

    def _eval_predictions(self, predictions, img_ids=None) -> None:
        """Evaluates in the order of the data set, whichever process predicted what.

        Raises:
            DatasetError: an image of the data set has no predictions or several, which would change AP in silence.
        """
        wanted = {image: place for place, image in enumerate(img_ids or self._coco_api.getImgIds())}
        counts = Counter(prediction["image_id"] for prediction in predictions)
        missing = [image for image in wanted if image not in counts]
        wrong = [image for image, count in counts.items() if count > 1 or image not in wanted]
        if missing or wrong:
            raise DatasetError(
                f"an evaluation must see each of {len(wanted)} images once: {len(missing)} were not seen {missing[:5]}, "
                f"{len(wrong)} several times or are not of the data set {wrong[:5]}; look at the test loader"
            )
        super()._eval_predictions(sorted(predictions, key=lambda p: wanted[p["image_id"]]), img_ids)

    def _make_contiguous(self, instances) -> dict:
        known = instances[self._contiguous[instances.pred_classes] >= 0]
        known.pred_classes = self._contiguous[known.pred_classes]
        return {"instances": known}


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer for DETRs; runs on GPUs over NCCL and in CPU processes over gloo.

    Args:
        cfg: a complete config, see :func:`dn_detr_d2.setup_cfg`.
        stop_request: one that listens already; otherwise signals count from :meth:`train` on.
    """

    def __init__(self, cfg, stop_request: StopRequest | None = None):
        TrainerBase.__init__(self)  # DefaultTrainer's own __init__ is written for GPUs only
        self.stop_request = stop_request or StopRequest()
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        devices = {} if next(model.parameters()).is_cuda else {"device_ids": None}
        model = create_ddp_model(model, broadcast_buffers=False, **devices)
        amp_dtype = AMP_DTYPES[cfg.SOLVER.AMP.DTYPE] if cfg.SOLVER.AMP.ENABLED else None
        self._trainer = TrainStep(model, loader, optimizer, amp_dtype, str(Path(cfg.OUTPUT_DIR) / "nan_report"))
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.device = next(model.parameters()).device
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            cfg=cfg,
            new_classes=True,
            progress=partial(progress, loader, self.device),
            trainer=weakref.proxy(self),
        )
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; a training that is resumed goes on with its images and its random numbers."""
        saved = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resuming:
            self.start_iter = self.iter + 1
            take_up(saved, self._trainer.data_loader, self.start_iter, self.device, self.cfg.SEED)

    def build_hooks(self) -> list:
        """Detectron2's hooks with our checkpoints; after an evaluation the best one and the instruments."""
        cfg = self.cfg
        found = [hook for hook in super().build_hooks() if not isinstance(hook, hooks.PeriodicCheckpointer)]
        added = build_instruments(cfg)
        if cfg.DATASETS.TEST:
            added.insert(0, BestCheckpointer(cfg.TEST.EVAL_PERIOD, self.checkpointer, best_metric(cfg)))
        evaluation = next(i for i, hook in enumerate(found) if isinstance(hook, hooks.EvalHook))
        found[evaluation + 1 : evaluation + 1] = added
        stop = StopHook(self.stop_request)
        found.insert(evaluation, CheckpointHook(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, stop))
        return [stop, ShortHistory(), *found, LeaveHook(stop)]

    def build_writers(self) -> list:
        """Detectron2's, with our printer in the place of its own, which is the first."""
        return [MetricPrinter(self.max_iter), *super().build_writers()[1:]]

    def train(self):
        """As Detectron2's; SIGTERM and SIGUSR1 end it with a checkpoint and SystemExit(75)."""
        self.stop_request.listen()
        try:
            return super().train()
        finally:
            self.stop_request.release()

    def after_train(self) -> None:
        """As Detectron2's; after an error or a stop only the writers finish, because other ranks may have left."""
        self.storage.iter = self.iter
        cut_off = sys.exc_info()[0] is not None
        for hook in self._hooks:
            if not cut_off:
                hook.after_train()
            elif isinstance(hook, hooks.PeriodicWriter):
                try:
                    hook.after_train()
                except OSError as error:  # a full disk, say, must not hide why the training ends
                    logger.warning("the last metrics were not written: %s", error)

    @classmethod
    def test(cls, cfg, model, evaluators=None) -> dict:
        """As Detectron2's; the random streams of the training stay where they are."""
        with own_randomness(0, next(model.parameters()).device):
            return super().test(cfg, model, evaluators)

    @classmethod
    def build_model(cls, cfg) -> nn.Module:
        """The model of the config, in training mode, with its size in the log."""
        from detectron2.modeling import build_model

        model = build_model(cfg)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        logger.debug("Model:\n%s", model)
        logger.info("Model: %.2f M parameters, %.2f M trainable, on %s", total / 1e6, trainable / 1e6, cfg.MODEL.DEVICE)
        return model

    @classmethod
    def build_optimizer(cls, cfg, model):
        """See :func:`dn_detr_d2.solver.build_optimizer`."""
        return solver.build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        """See :func:`dn_detr_d2.data.build_train_loader`."""
        return data.build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        """See :func:`dn_detr_d2.data.build_test_loader`."""
        return data.build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name) -> DatasetEvaluator:
        """COCO's AP; results go to OUTPUT_DIR/inference."""
        raw_ids = list(cfg.MODEL.DN_DETR.CLASS_NAMES) == list(raw_names())
        output_dir = str(Path(cfg.OUTPUT_DIR) / "inference")
        return TolerantCOCOEvaluator(dataset_name, tasks=("bbox",), output_dir=output_dir, raw_ids=raw_ids)


def best_metric(cfg) -> str:
    """Name under which d2's EvalHook logs AP; with several test sets, that of the first."""
    return "bbox/AP" if len(cfg.DATASETS.TEST) == 1 else f"{cfg.DATASETS.TEST[0]}/bbox/AP"


def load_for_evaluation(cfg) -> nn.Module:
    """The model of the config with all of MODEL.WEIGHTS; raises CheckpointError if the file lacks a tensor."""
    model = Trainer.build_model(cfg).eval()
    Checkpointer(model, cfg=cfg).load(cfg.MODEL.WEIGHTS)
    return model


def evaluate(cfg) -> dict:
    """Evaluates MODEL.WEIGHTS on DATASETS.TEST; returns Detectron2's results."""
    return Trainer.test(cfg, load_for_evaluation(cfg))


def check_processes(cfg, num_processes: int, num_machines: int = 1, *, cpu_wanted: bool = False) -> None:
    """Refuses ``--num-gpus`` that this machine cannot serve.

    Args:
        cfg: the config.
        num_processes: on this machine.
        num_machines: of the whole run.
        cpu_wanted: whether the user asked for MODEL.DEVICE cpu, rather than having no GPU.

    Raises:
        ConfigError: more GPUs than exist, several CPU processes where GPUs are visible, or an uneven batch.
    """
    gpus, on_gpu = torch.cuda.device_count(), str(cfg.MODEL.DEVICE).startswith("cuda")
    if num_processes < 1:
        raise ConfigError(f"--num-gpus must be at least 1, got {num_processes}")
    if on_gpu and num_processes > gpus:
        raise ConfigError(f"--num-gpus {num_processes}, but this machine has {gpus}; lower it or add MODEL.DEVICE cpu")
    if not on_gpu and num_processes > 1 and gpus:
        raise ConfigError(
            f"--num-gpus {num_processes} with MODEL.DEVICE cpu starts CPU processes, which must not see a GPU; "
            "set CUDA_VISIBLE_DEVICES=''"
        )
    if not on_gpu and num_processes > 1 and not cpu_wanted:
        raise ConfigError(
            f"--num-gpus {num_processes}, but this machine has no GPU; for {num_processes} CPU processes (gloo) add "
            "MODEL.DEVICE cpu"
        )
    world = num_processes * num_machines
    if cfg.SOLVER.IMS_PER_BATCH % world:
        raise ConfigError(f"SOLVER.IMS_PER_BATCH = {cfg.SOLVER.IMS_PER_BATCH} is not divisible by {world} processes")
