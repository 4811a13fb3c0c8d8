"""The program ``dn-detr``: finds the verb, and calls the module of dn_detr_d2.commands that does the work.

It stands beside the package because importing that takes seconds: help and mistakes are answered before, and the signals
that end a training are handled from the first moment on.
"""

import importlib
import importlib.util
import os
import re
import signal
import sys
from difflib import get_close_matches
from pathlib import Path

# verb -> (module of dn_detr_d2.commands, what it does)
VERBS = {
    "train": ("train", "trains a detector"),
    "eval": ("evaluate", "evaluates a trained detector: COCO AP, panoptic quality, mean IoU"),
    "predict": ("predict", "draws and writes what a detector finds in images, folders and videos"),
    "export": ("export", "writes a detector as ONNX, or for torch.export and AOTInductor, and checks the result"),
    "check": ("check", "lists what is wrong with a COCO-format data set, repairs it, or splits it in two"),
    "convert": ("convert", "converts YOLO and Pascal VOC data sets to COCO, and checkpoints of other projects"),
    "doctor": ("doctor", "reports versions, hardware and self-tests of this installation"),
}
HELP = """\
usage: dn-detr VERB ...

Object detectors trained with query denoising (DN-DETR, DINO and others), for Detectron2.

verbs:
{verbs}

dn-detr VERB --help shows the options of a verb, dn-detr --version the version.

examples:
  dn-detr train --config-file configs/quickstart.yaml OUTPUT_DIR output/quickstart
  dn-detr eval --config-file output/quickstart/config.yaml MODEL.WEIGHTS output/quickstart/model_final.pth
  dn-detr predict --config-file output/quickstart/config.yaml --input photos/ --output drawn/ \\
      MODEL.WEIGHTS output/quickstart/model_final.pth
  dn-detr check train.json images/train --val val.json images/val

KEY VALUE pairs at the end override the config. Exit codes: 0 = done; 1 = done with faults, or failed while running;
2 = bad input, nothing was done; 75 = a training that a signal has stopped, to be continued with --resume.
"""
STOPPED = 75  # EX_TEMPFAIL of sysexits.h


def leave_early(number: int, frame) -> None:
    """Handles SIGTERM and SIGUSR1 while there is nothing to save; a training installs its own handler."""
    signal.signal(number, signal.SIG_IGN)
    name = signal.Signals(number).name
    os.write(2, f"{name}: stopped, nothing was under way that had to be kept; run the same command again\n".encode())
    sys.exit(STOPPED)


def handle_signals() -> None:
    """From now on :func:`leave_early` handles the signals that stop a training."""
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), leave_early)


def unknown_word(word: str, known: list[str], kind: str) -> str:
    """The sentence about a word on the command line that is none of those known, with the nearest."""
    near = get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return f"{word!r} is no {kind}; {hint}"


def version() -> str:
    """Version of the package, read from its source."""
    source = Path(importlib.util.find_spec("dn_detr_d2").origin).read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"', source, re.MULTILINE)[1]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code, but for trainings and evaluations that end with another than 0: they leave."""
    verb, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if verb in ("-h", "--help", "help", ""):
        verbs = "\n".join(f"  {name:<8}  {text}" for name, (_, text) in VERBS.items())
        print(HELP.format(verbs=verbs), end="", file=sys.stdout if verb else sys.stderr)
        return 0 if verb else 2
    if verb in ("--version", "-V"):
        print(f"dn-detr {version()}")
        return 0
    if verb not in VERBS:
        print(f"error: {unknown_word(verb, list(VERBS), 'verb of dn-detr')}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"dn_detr_d2.commands.{VERBS[verb][0]}")
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return getattr(module, "run_and_leave", module.main)(rest)


# In the processes that a training starts, too: they import the main program first.
if Path(sys.argv[0]).stem in ("dn-detr", "dn_detr_d2_cli") and sys.argv[1:2] in (["train"], ["eval"]):
    handle_signals()

if __name__ == "__main__":
    sys.exit(main())
