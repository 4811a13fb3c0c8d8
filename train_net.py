#!/usr/bin/env python3
"""Trains or evaluates a detector.

    python train_net.py --config-file configs/dn_dab_deformable.yaml --num-gpus 8
    python train_net.py --config-file configs/dn_dab_deformable.yaml --eval-only MODEL.WEIGHTS model_final.pth

Without GPUs, ``--num-gpus N MODEL.DEVICE cpu`` starts N processes that talk over gloo. ``torchrun train_net.py ...`` and
anything else that sets RANK, WORLD_SIZE and LOCAL_RANK works as well; see docs/cluster.md.

SIGTERM or SIGUSR1 ends a training after the present step, or in the midst of an evaluation, with a checkpoint and exit code
75: the same command with ``--resume`` continues from there, bitwise identical to an uninterrupted run. Before the first
step, and with ``--eval-only``, nothing has to be saved, and the code is 75 too. Other exit codes: 0 = done, 1 = an error,
which the last line names, or Ctrl-C.
"""

import os
import signal
import sys


def leave_early(number: int, frame) -> None:
    """Handles SIGTERM and SIGUSR1 while there is nothing to save; a training installs its own handler."""
    signal.signal(number, signal.SIG_IGN)
    name = signal.Signals(number).name
    os.write(2, f"{name}: stopped, nothing was under way that had to be kept; run the same command again\n".encode())
    sys.exit(75)


if __name__ in ("__main__", "__mp_main__"):  # now, because the imports take seconds
    for _name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, _name):
            signal.signal(getattr(signal, _name), leave_early)

import logging
from pathlib import Path

from dn_detr_d2 import setup_cfg  # before detectron2, whose import alone warns of torch.jit

# isort: split
import torch
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from dn_detr_d2 import ConfigError, MultiScaleDeformableAttention
from dn_detr_d2.config import device_is_named
from dn_detr_d2.data import check_files, check_records
from dn_detr_d2.engine import (
    Trainer,
    check_processes,
    evaluate,
    format_error,
    init_distributed,
    leave,
    load_for_evaluation,
    rank_info_from_env,
)
from dn_detr_d2.engine.extras import check_extras
from dn_detr_d2.engine.launch import launch
from dn_detr_d2.layers import uses_kernel
from dn_detr_d2.modeling.registry import name_the_node
from dn_detr_d2.report import announce, report_after_training
from dn_detr_d2.utils.text_output import escape_unwritable


def main(args) -> dict | None:
    """Runs in every process: one training or one evaluation; returns the results."""
    cfg = setup_cfg(args.config_file, args.opts, splits=splits(args))
    cfg.freeze()
    if args.eval_only:  # the folder may be a training's: its config.yaml stays as it is
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())
    else:
        default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="dn_detr_d2")
    escape_unwritable("detectron2", "fvcore", "dn_detr_d2")
    if args.eval_only:
        results = evaluate(cfg)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    announce(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    results = trainer.train()
    report_after_training(cfg)
    return results


def splits(args) -> tuple[str, ...]:
    """Which data must be at hand."""
    return ("TEST",) if args.eval_only else ("TRAIN", "TEST")


def check(args) -> float:
    """Everything that can be refused before a process starts or a file is written; returns DIST_TIMEOUT."""
    cfg = setup_cfg(args.config_file, args.opts, splits=splits(args))
    if not args.eval_only:
        check_extras(cfg)
    cpu_wanted = device_is_named(args.config_file, args.opts)
    check_processes(cfg, args.num_gpus, args.num_machines, cpu_wanted=cpu_wanted)
    needed = splits(args)[0]
    if not cfg.DATASETS[needed]:
        raise ConfigError(f"DATASETS.{needed} is empty; give --config-file or name a data set")
    for split in splits(args):
        for name in cfg.DATASETS[split]:
            # what is trained on is read at once, what is tested on much later
            (check_records if split == "TEST" else check_files)(name)
    weights = cfg.MODEL.WEIGHTS
    if args.eval_only and not weights:
        raise ConfigError("--eval-only needs MODEL.WEIGHTS")
    local = "://" not in weights
    if weights and local and not Path(weights).is_file():
        raise ConfigError(f"MODEL.WEIGHTS = {weights!r} does not exist; name a checkpoint, or '' to start at random")
    check_model(cfg, load=args.eval_only and local)
    return cfg.DIST_TIMEOUT


def check_model(cfg, load: bool) -> None:
    """Builds the model on the CPU, and loads MODEL.WEIGHTS, only to see that it can be done; raises ConfigError."""
    backend, device = cfg.MODEL.DN_DETR.OP_BACKEND, torch.device(cfg.MODEL.DEVICE).type
    cfg.MODEL.DEVICE, cfg.MODEL.DN_DETR.OP_BACKEND = "cpu", "torch"
    try:
        model = (load_for_evaluation if load else build_model)(cfg)
    except (KeyError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"the model cannot be built or loaded: {' '.join(str(error).split())}") from None
    if any(isinstance(module, MultiScaleDeformableAttention) for module in model.modules()):
        with name_the_node("MODEL.DN_DETR.OP_BACKEND"):
            uses_kernel(backend, device)  # refuses what the run itself would refuse


def run() -> int:
    """Command line; returns the exit code. Whatever goes wrong is one sentence in the last line of stderr."""
    escape_unwritable()
    args, rank_info = default_argument_parser(epilog=__doc__).parse_args(), None
    try:
        if rank_info := rank_info_from_env(os.environ):
            return run_as_assigned(rank_info, args)
        timeout = check(args)
        machines = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
        return launch(main, *machines, timeout, (args,))
    except (Exception, KeyboardInterrupt) as error:
        return fail(format_error(error, rank_info))


def run_as_assigned(rank_info, args) -> int:
    """One of the processes that torchrun or SLURM has started; an error also goes where torchrun looks for it."""
    args.num_gpus, args.num_machines = rank_info.local_world_size, rank_info.world_size // rank_info.local_world_size
    handler = get_error_handler()
    handler.initialize()
    try:
        init_distributed(rank_info, check(args))
        main(args)
    except Exception as error:
        handler.record_exception(error)
        raise
    return 0


def fail(sentence: str) -> int:
    """Prints the last line; where the error was raised goes to the debug log."""
    logging.getLogger("dn_detr_d2").debug("where it happened:", exc_info=True)
    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return 1


def run_and_leave() -> None:
    """Runs; with an exit code other than 0 nothing is waited for at the end of the process."""
    try:
        code = run()
    except SystemExit as leaving:  # 75, or 2 of a command line that cannot be read
        code = leaving.code or 0
    if code:
        leave(code)


if __name__ == "__main__":
    run_and_leave()
