"""Denoising, losses and matching without Detectron2, fvcore and pycocotools, in an interpreter that cannot import them."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = """
    import importlib.abc
    import sys

    class Block(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("detectron2", "fvcore", "pycocotools"):
                raise ModuleNotFoundError(f"{name} is blocked", name=name)

    sys.meta_path.insert(0, Block())
"""
USE = """
    import torch
    from dn_detr_d2 import ContrastiveDenoisingGenerator, DenoisingGenerator, QueryDenoising
    from dn_detr_d2 import HungarianMatcher, SetCriterion, cxcywh_to_xyxy, ms_deform_attn
    from dn_detr_d2.denoising import LabelEncoder, NoisedTargets, QueryGroups, embed_boxes, noise
    from dn_detr_d2.errors import LeakError
    from dn_detr_d2.losses import BoxGIoU, BoxL1, ClassFocal, ClassSoftmax
    from dn_detr_d2.structures import Predictions, Targets

    targets = [{"labels": torch.tensor([1, 2]), "boxes": torch.full((2, 4), 0.4)}]
    for generator in (DenoisingGenerator(num_classes=3), ContrastiveDenoisingGenerator(num_classes=3, num_queries=4)):
        dn = QueryDenoising(generator, dim=8)(targets)
        content, boxes, mask = dn.prepend(torch.zeros(1, 6, 7), torch.full((1, 6, 4), 0.5))
        outputs, rest = dn.split((torch.zeros(2, *content.shape[:2], 3), boxes.expand(2, -1, -1, -1)))
        assert outputs[0].shape == (2, 1, 6, 3)
        assert set(dn.losses(rest)) >= {"dn/class", "dn/l1", "dn/giou", "dn/class_0"}
    padded = Targets.pad([x["labels"] for x in targets], [x["boxes"] for x in targets])
    predictions = Predictions(*outputs)
    SetCriterion()(predictions, padded, HungarianMatcher()(predictions, padded), 2.0)
    assert not {"detectron2", "fvcore", "pycocotools"} & {name.partition(".")[0] for name in sys.modules}
    print("used")
"""


def run(code):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)


def test_the_core_is_imported_and_used():
    done = run(BLOCK + USE)
    assert done.stdout == "used\n", done.stderr


def test_the_example_of_the_readme_runs():
    """The blocks of README.md that use QueryDenoising."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    blocks = [block for block in blocks if "QueryDenoising(" in block]
    assert blocks
    done = run(textwrap.dedent(BLOCK) + "\n".join(blocks))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "dn_detr_d2.setup_cfg",
        "dn_detr_d2.DenoisingDETR",
        "import dn_detr_d2.predictor",
        "from dn_detr_d2.engine import Trainer",
    ],
)
def test_what_needs_detectron2_says_how_to_install_it(line):
    done = run(f"{BLOCK}\n    import dn_detr_d2\n    {line}")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr
    assert "tools/install_detectron2.py" in done.stderr
