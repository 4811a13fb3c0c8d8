#!/usr/bin/env python3
"""Pushes a trained model to the Hugging Face Hub: model.safetensors, config.yaml and a model card to be completed.

    python tools/push_to_hub.py --config-file output/quickstart/config.yaml --repo user/name --dry-run \\
        MODEL.WEIGHTS output/quickstart/model_final.pth
    python tools/push_to_hub.py --config-file output/quickstart/config.yaml --repo user/name \\
        MODEL.WEIGHTS output/quickstart/model_final.pth

--dry-run writes the folder and uploads nothing. The last line is the MODEL.WEIGHTS that others load it by. Exit code 2: bad
input, or the hub refuses.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dn_detr_d2 import ConfigError, setup_cfg
from dn_detr_d2.command_line import add_overrides, add_weights, parse, required_weights, run_command
from dn_detr_d2.utils.requirements import is_installed


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="model repository on the hub")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config.yaml of the training")
    add_weights(parser, "of the training")
    parser.add_argument("--output", metavar="FOLDER", help="what is pushed is written here (default OUTPUT_DIR/hub)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="write the folder, upload nothing")
    add_overrides(parser)
    return parse(parser, argv)


def work(args: argparse.Namespace) -> list[str]:
    """Writes the folder and pushes it; returns lines for the user."""
    weights = required_weights(args)
    cfg = setup_cfg(args.config_file, [*args.opts, "MODEL.WEIGHTS", weights], splits=())
    if not is_installed("huggingface_hub"):
        raise ConfigError("the hub needs the package huggingface_hub; pip install 'dn_detr_d2[hub]'")
    from dn_detr_d2.hub import SCHEME, prepare_folder, push

    folder = Path(args.output or Path(cfg.OUTPUT_DIR) / "hub")
    sha256 = prepare_folder(cfg, folder, args.repo)
    lines = [f"folder: {folder}", f"complete {folder / 'README.md'}: what is to be filled in, the licence first"]
    if args.dry_run:
        return [*lines, "nothing was uploaded (--dry-run)"]
    revision = push(folder, args.repo, private=args.private)
    return [*lines, f"MODEL.WEIGHTS {SCHEME}{args.repo}@{revision} MODEL.WEIGHTS_SHA256 {sha256}"]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: print(*work(args), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
