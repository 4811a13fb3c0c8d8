#!/usr/bin/env python3
"""Trains or evaluates a detector; the same as ``dn-detr train``, under the name that projects of Detectron2 have.

python train_net.py --config-file configs/dn_dab_deformable.yaml --num-gpus 8 OUTPUT_DIR output/dn
python train_net.py --config-file configs/dn_dab_deformable.yaml --eval-only MODEL.WEIGHTS output/dn/model_final.pth
"""

from dn_detr_d2_cli import handle_signals

if __name__ in ("__main__", "__mp_main__"):  # now, because the imports take seconds
    handle_signals()

from dn_detr_d2.commands.train import run_and_leave

if __name__ == "__main__":
    run_and_leave()
