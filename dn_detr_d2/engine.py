"""Training and evaluation on Detectron2's engine: the trainer, its step, and the hooks that differ."""

import json
import logging
import math
import time
import weakref
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer, SimpleTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from . import data, solver
from .checkpoint import convert, pointed_checkpoint, read_checkpoint
from .coco import NUM_RAW_CLASSES, RAW_IDS, raw_names
from .errors import CheckpointError, ConfigError
from .evaluation import build_instruments

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


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with safe reading, converted names and classes that may change.

    Conversion happens when a training starts from a file and when a file is evaluated; a run that is resumed reads what it
    wrote. Saved files carry the class names and the config.

    Args:
        model, save_dir, checkpointables: as for DetectionCheckpointer.
        cfg: for the class names.
        new_classes: whether classes that the file lacks may start at random.
    """

    def __init__(self, model, save_dir: str = "", *, cfg, new_classes: bool = False, **checkpointables):
        super().__init__(model, save_dir, **checkpointables)
        self.class_names, self.config = list(cfg.MODEL.DN_DETR.CLASS_NAMES), cfg.dump()
        self.new_classes, self._resuming = new_classes, False

    def get_checkpoint_file(self) -> str:
        """Path of the newest checkpoint of the folder, "" if there is none; it lies in the folder, or is refused."""
        return pointed_checkpoint(self.save_dir)

    def resume_or_load(self, path: str, *, resume: bool = True):
        """As Detectron2's."""
        self._resuming = resume and self.has_checkpoint()
        return super().resume_or_load(path, resume=resume)

    def save(self, name: str, **kwargs) -> None:
        """Writes ``name``.pth."""
        super().save(name, class_names=self.class_names, config=self.config, **kwargs)

    def _load_file(self, filename: str) -> dict:
        if self._resuming:
            try:
                return torch.load(filename, map_location="cpu", weights_only=True)
            except Exception as error:
                first = (str(error).strip().splitlines() or [repr(error)])[0]
                raise CheckpointError(
                    f"the checkpoint to resume from, {filename}, is damaged ({first}); write the name of an earlier "
                    "model_*.pth into the file last_checkpoint beside it"
                ) from None
        file = read_checkpoint(filename)
        return {"model": file.state, "class_names": file.class_names}

    def _load_model(self, checkpoint: dict):
        if not self._resuming:
            own = self.model.state_dict()
            conversion = convert(checkpoint["model"], own, checkpoint.pop("class_names", []), self.class_names)
            if conversion.new_classes and not self.new_classes:
                raise CheckpointError(
                    f"the checkpoint ({conversion.source}) lacks {len(conversion.new_classes)} of the model's classes "
                    f"({', '.join(conversion.new_classes[:4])}), which only a training can add"
                )
            for sentence in conversion.log:
                logger.info(sentence)
            checkpoint["model"] = conversion.state
        return super()._load_model(checkpoint)


class BestCheckpointer(hooks.BestCheckpointer):
    """Keeps the best checkpoint over resumes, and leaves ``last_checkpoint`` to the periodic one.

    The best value stands in ``best_metric.json`` beside ``model_best.pth``: a periodic checkpoint is written before the
    evaluation of its iteration, so it could not know.
    """

    @property
    def _record(self) -> Path:
        return Path(self._checkpointer.save_dir) / "best_metric.json"

    def before_train(self) -> None:
        """Takes up the best value of the run that is resumed."""
        if self.trainer.start_iter > 0 and self._record.is_file():
            record = json.loads(self._record.read_text())
            self.best_metric, self.best_iter = record["value"], record["iteration"]

    def _update_best(self, val, iteration) -> bool:
        updated = super()._update_best(val, iteration)
        if updated:
            self._record.write_text(json.dumps({"metric": self._val_metric, "value": val, "iteration": iteration}))
        return updated

    def _best_checking(self) -> None:
        last = self._checkpointer.get_checkpoint_file()
        super()._best_checking()
        if last:
            self._checkpointer.tag_last_checkpoint(Path(last).name)


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

    def _make_contiguous(self, instances) -> dict:
        known = instances[self._contiguous[instances.pred_classes] >= 0]
        known.pred_classes = self._contiguous[known.pred_classes]
        return {"instances": known}


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer for DETRs; runs on GPUs over NCCL and in CPU processes over gloo.

    Args:
        cfg: a complete config, see :func:`dn_detr_d2.setup_cfg`.
    """

    def __init__(self, cfg):
        TrainerBase.__init__(self)  # DefaultTrainer's own __init__ is written for GPUs only
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        devices = {} if next(model.parameters()).is_cuda else {"device_ids": None}
        model = create_ddp_model(model, broadcast_buffers=False, **devices)
        amp_dtype = AMP_DTYPES[cfg.SOLVER.AMP.DTYPE] if cfg.SOLVER.AMP.ENABLED else None
        self._trainer = TrainStep(model, loader, optimizer, amp_dtype, str(Path(cfg.OUTPUT_DIR) / "nan_report"))
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, cfg=cfg, new_classes=True, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list:
        """Detectron2's hooks; after each evaluation the best checkpoint by AP and the instruments, before the writers."""
        found = super().build_hooks()
        added = build_instruments(self.cfg)
        if comm.is_main_process() and self.cfg.DATASETS.TEST:
            added.insert(0, BestCheckpointer(self.cfg.TEST.EVAL_PERIOD, self.checkpointer, best_metric(self.cfg)))
        after_evaluation = next(i for i, hook in enumerate(found) if isinstance(hook, hooks.EvalHook)) + 1
        found[after_evaluation:after_evaluation] = added
        return found

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
