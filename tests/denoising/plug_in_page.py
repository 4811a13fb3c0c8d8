"""The code of docs/plug_in.md as a module, and images of the embedded data set in DETR's terms."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plug_in.md"


def page_code():
    """The code of docs/plug_in.md."""
    return run_blocks(PAGE)


def run_blocks(page):
    """All Python blocks of a page, run one after the other in one namespace."""
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(page), "exec"), names)
    return SimpleNamespace(**names)


def shapes(count, size=128):
    """(images (count, 3, size / 2, size / 2), targets) of the embedded data set, padded to a square, at half the size."""
    from detectron2.data import DatasetCatalog

    from dn_detr_d2.data import read_image

    images, targets = torch.zeros(count, 3, size, size), []
    for image, record in zip(images, DatasetCatalog.get("shapes_train")[:count], strict=True):
        pixels = torch.from_numpy(read_image(record["file_name"], "RGB").copy()).permute(2, 0, 1) / 255
        image[:, : pixels.shape[1], : pixels.shape[2]] = pixels - 0.5
        boxes = torch.tensor([x["bbox"] for x in record["annotations"]]).reshape(-1, 4)
        boxes = torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], 1) / size
        labels = torch.tensor([x["category_id"] for x in record["annotations"]], dtype=torch.int64)
        targets.append({"labels": labels, "boxes": boxes})
    return torch.nn.functional.avg_pool2d(images, 2), targets
