"""Trains a detector, or evaluates one with --eval-only.

    dn-detr train --config-file configs/dn_dab_deformable.yaml --num-gpus 8 OUTPUT_DIR output/dn
    dn-detr train --config-file configs/dn_dab_deformable.yaml --num-gpus 8 --resume OUTPUT_DIR output/dn

Without GPUs, --num-gpus N MODEL.DEVICE cpu starts N processes that talk over gloo. In a checkout, train_net.py is the same
program: torchrun train_net.py ... and anything else that sets RANK, WORLD_SIZE and LOCAL_RANK works as well
(docs/cluster.md).

SIGTERM or SIGUSR1 ends a training after the present step, or in the midst of an evaluation, with a checkpoint and exit code
75: the same command with --resume continues from there, bitwise identical to an uninterrupted run. Before the first step,
and with --eval-only, nothing has to be saved, and the code is 75 too. Other exit codes: 0 = done, 1 = failed while running,
or Ctrl-C, 2 = bad input, nothing was written. The last line names the error.
"""

from ..utils import needs_detectron2  # noqa: F401

# isort: split
import argparse
import glob
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.engine import HookBase, default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ..checkpoint.checksums import write_record
from ..checkpoint.packages import SCHEME, find_packaged
from ..checkpoint.resume import POINTER, bring_back, has_checkpoints, moved_path, set_aside
from ..command_line import BAD_INPUT, FAILED, make_parser
from ..config import device_is_named
from ..config.zoo import find_config_file
from ..data import check_files, check_records
from ..engine import (
    Trainer,
    check_processes,
    evaluate,
    format_error,
    init_distributed,
    leave,
    load_for_evaluation,
    rank_info_from_env,
)
from ..engine.extras import check_extras
from ..engine.launch import launch
from ..engine.setup import setup_cfg, setup_for_evaluation
from ..engine.trainer import check_hooks, scaled_to_workers
from ..errors import ConfigError, UserError
from ..layers import MultiScaleDeformableAttention, uses_kernel
from ..modeling.registry import name_the_node
from ..report import announce, report_after_training
from ..utils.text_output import escape_unwritable

# What differs from Detectron2's texts, which name configs in Python and its own trainer.
HELP = {
    "config_file": "a YAML file, or the name of one of the model zoo",
    "opts": "KEY VALUE pairs, overrides of the config, at the end",
    "resume": "continue from the newest intact checkpoint in OUTPUT_DIR",
}


def training_parser(text: str) -> argparse.ArgumentParser:
    """Detectron2's command line of trainings; its help begins with ``text``."""
    own, parser = make_parser(text), default_argument_parser()
    parser.prog, parser.description, parser.epilog = own.prog, own.description, None
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return training_parser(__doc__).parse_args(argv)


def run_process(args: argparse.Namespace) -> dict | None:
    """Runs in every process: one training or one evaluation; returns the results."""
    cfg = config_of(args)
    cfg.freeze()
    for name in ("fvcore", "detectron2", "dn_detr_d2"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)
    escape_unwritable("detectron2", "fvcore", "dn_detr_d2")
    if args.eval_only:
        results = evaluate(cfg)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    earlier = None
    if comm.is_main_process() and not (args.resume and has_checkpoints(Path(cfg.OUTPUT_DIR))):
        earlier = set_aside(Path(cfg.OUTPUT_DIR))
    earlier = comm.all_gather(earlier)[0]
    if earlier:
        cfg.defrost()
        cfg.MODEL.WEIGHTS = moved_path(cfg.MODEL.WEIGHTS, earlier)
        noise = cfg.MODEL.DN_DETR.DENOISING.LABEL_NOISE
        noise.CONFUSION_MATRIX = moved_path(noise.CONFUSION_MATRIX, earlier)
        cfg.freeze()
    begin(cfg, args)
    announce(cfg)
    beginning = Beginning(cfg)
    try:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.register_hooks([beginning])
        results = trainer.train()
    except Exception:
        if earlier and not beginning.reached and comm.is_main_process():
            bring_back(earlier)
        raise
    report_after_training(cfg)
    return results


class Beginning(HookBase):
    """Writes config.yaml before the first step, as the last hook: what refuses a training has looked at it by then.

    A ``--resume`` that is refused names the config.yaml of the training as the way out, so it must still be there.

    Args:
        cfg: of the training.

    Attributes:
        reached: whether the training has begun.
    """

    def __init__(self, cfg):
        self.cfg, self.reached = cfg, False

    def before_train(self) -> None:
        """Writes the file on rank 0."""
        self.reached = True
        if comm.is_main_process():
            write_record(Path(self.cfg.OUTPUT_DIR) / "config.yaml", self.cfg.dump())


def begin(cfg, args: argparse.Namespace) -> None:
    """Logs what a training is made of, and seeds its random streams: Detectron2's ``default_setup`` but for config.yaml."""
    log = logging.getLogger("detectron2")
    log.info("Rank of current process: %d. World size: %d", comm.get_rank(), comm.get_world_size())
    log.info("Environment info:\n%s", collect_env_info())
    log.info("Command line arguments: %s", args)
    if args.config_file:
        log.info("Contents of %s:\n%s", args.config_file, Path(args.config_file).read_text(encoding="utf-8"))
    log.info("Running with full config:\n%s", cfg.dump())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def splits(args) -> tuple[str, ...]:
    """Which data must be at hand."""
    return ("TEST",) if args.eval_only else ("TRAIN", "TEST")


def config_of(args):
    """The complete config of a training, or of an evaluation, whose classes are those of the weights."""
    if not args.eval_only:
        return setup_cfg(args.config_file, args.opts)
    return setup_for_evaluation(args.config_file, args.opts)


def check(args) -> float:
    """Everything that can be refused before a process starts or a file is written; returns DIST_TIMEOUT."""
    cfg = config_of(args)
    if not args.eval_only:
        check_extras(cfg)
        check_hooks(cfg)
    cpu_wanted = device_is_named(args.config_file, args.opts)
    processes = args.num_gpus * args.num_machines
    scaled = cfg if args.eval_only or processes < 1 else scaled_to_workers(cfg, processes)
    check_processes(scaled, args.num_gpus, args.num_machines, cpu_wanted=cpu_wanted)
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
    if weights.startswith(SCHEME):
        find_packaged(weights)  # refuses an unknown name and a package that is not installed
    local = "://" not in weights
    beside = Path(args.config_file).parent
    of_a_training = Path(args.config_file).name == "config.yaml" and (beside / POINTER).is_file()
    if args.eval_only and of_a_training and "MODEL.WEIGHTS" not in args.opts:
        raise ConfigError(
            f"MODEL.WEIGHTS of {args.config_file}, {weights!r}, is what its training began with; add MODEL.WEIGHTS "
            f"{beside / 'model_final.pth'}, or whatever is to be evaluated"
        )
    goes_on = not args.eval_only and args.resume and has_checkpoints(Path(cfg.OUTPUT_DIR))  # and reads no other weights
    if weights and local and not goes_on and not Path(weights).is_file():
        moved = sorted(Path(cfg.OUTPUT_DIR).glob(f"earlier_*/{glob.escape(Path(weights).name)}"), key=os.path.getmtime)
        way_out = f"name {moved[-1]}, where it was moved to" if moved else "name a checkpoint, or '' to start at random"
        raise ConfigError(f"MODEL.WEIGHTS = {weights!r} does not exist; {way_out}")
    check_model(cfg, load=args.eval_only and local)
    return cfg.DIST_TIMEOUT


def check_model(cfg, load: bool) -> None:
    """Builds the model on the CPU, and loads MODEL.WEIGHTS, only to see that it can be done; raises ConfigError."""
    backend, device = cfg.MODEL.DN_DETR.OP_BACKEND, torch.device(cfg.MODEL.DEVICE).type
    cfg.MODEL.DEVICE, cfg.MODEL.DN_DETR.OP_BACKEND = "cpu", "torch"
    try:
        model = (load_for_evaluation if load else Trainer.build_model)(cfg)
    except (KeyError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"the model cannot be built or loaded: {' '.join(str(error).split())}") from None
    if any(isinstance(module, MultiScaleDeformableAttention) for module in model.modules()):
        with name_the_node("MODEL.DN_DETR.OP_BACKEND"):
            uses_kernel(backend, device)  # refuses what the run itself would refuse


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code. Whatever goes wrong is one sentence in the last line of stderr."""
    return run(parse_arguments(argv))


def run(args: argparse.Namespace) -> int:
    """As :func:`main`, of a command line that is parsed: in one process, in several, or as one that torchrun started."""
    escape_unwritable()
    args.config_file = find_config_file(args.config_file)  # Detectron2 copies the file into the log
    rank_info, refused = None, BAD_INPUT
    try:
        if rank_info := rank_info_from_env(os.environ):
            args.num_gpus = rank_info.local_world_size
            args.num_machines = rank_info.world_size // rank_info.local_world_size
            get_error_handler().initialize()
        timeout = check(args)
        refused = FAILED  # from here on, something is under way
        if not rank_info:
            machines = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
            return launch(run_process, *machines, timeout, (args,))
        init_distributed(rank_info, timeout)
        run_process(args)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if rank_info and isinstance(error, Exception):
            get_error_handler().record_exception(error)  # where torchrun looks for it
        return fail(format_error(error, rank_info), refused if isinstance(error, UserError) else FAILED)


def fail(sentence: str, code: int) -> int:
    """Prints the last line and returns the code; where the error was raised goes to the debug log."""
    logging.getLogger("dn_detr_d2").debug("where it happened:", exc_info=True)
    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return code


def run_and_leave(argv: list[str] | None = None, program: Callable[[list[str] | None], int] = main) -> int:
    """Runs a program; with an exit code other than 0 nothing is waited for at the end of the process."""
    try:
        code = program(argv)
    except SystemExit as leaving:  # 75, or 2 of a command line that cannot be read
        code = leaving.code or 0
    if code:
        leave(code)
    return 0
