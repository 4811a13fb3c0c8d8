"""A DETR made of torchvision and PyTorch alone, and the same with denoising.

    python examples/torchvision_detr.py --iterations 2000 --seed 1 [--no-denoising]

Queries have boxes that each decoder layer corrects (Deformable DETR, DAB-DETR). Matching and its losses are made of
torchvision's operators. Shapes: N images, Q queries, K layers, C channels, P classes.
"""

import torch
from scipy.optimize import linear_sum_assignment
from shapes_training import CLASSES, run
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from dn_detr_d2 import DenoisingGenerator, QueryDenoising, check_isolation


class TorchvisionDETR(nn.Module):
    """A ResNet-10 up to its map of an eighth, an encoder layer, K decoder layers."""

    def __init__(self, num_classes: int, dim: int = 128, num_queries: int = 30, num_layers: int = 3):
        super().__init__()
        self.backbone = nn.Sequential(*list(ResNet(BasicBlock, [1, 1, 1, 1]).children())[:-4])
        self.project = nn.Conv2d(128, dim, 1)
        options = {"nhead": 8, "dim_feedforward": 2 * dim, "dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoderLayer(dim, **options)
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(dim, **options) for _ in range(num_layers))
        self.content = nn.Embedding(num_queries, dim)
        self.anchors = nn.Parameter(torch.rand(num_queries, 4).logit(1e-3))
        self.position = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.classify, self.locate = nn.Linear(dim, num_classes), nn.Linear(dim, 4)
        nn.init.constant_(self.classify.bias, -4.0)
        nn.init.zeros_(self.locate.weight)
        nn.init.zeros_(self.locate.bias)

    def sine(self, x: Tensor) -> Tensor:
        """(..., n) numbers in [0, 1] -> (..., n C / 2)."""
        waves = torch.pi * 1.3 ** torch.arange(self.project.out_channels // 4, device=x.device)
        angles = x[..., None] * waves.clamp(max=64 * torch.pi)
        return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)

    def encode(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, H W / 64, C)."""
        maps = self.project(self.backbone(images))
        y, x = (torch.arange(n, device=maps.device).add(0.5).div(n) for n in maps.shape[-2:])
        place = self.sine(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)).flatten(0, 1)
        return self.encoder(maps.flatten(2).transpose(1, 2) + place) + place

    def queries(self, num_images: int) -> tuple[Tensor, Tensor]:
        """Contents (N, Q, C) and boxes (N, Q, 4)."""
        return self.content.weight.expand(num_images, -1, -1), self.anchors.sigmoid().expand(num_images, -1, -1)

    def decode(self, content: Tensor, boxes: Tensor, mask: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (K, N, Q, P) and boxes (K, N, Q, 4)."""
        outputs = []
        for layer in self.layers:
            content = layer(content + self.position(self.sine(boxes)), memory, tgt_mask=mask)
            outputs.append((self.classify(content), (boxes.logit(1e-3) + self.locate(content)).sigmoid()))
            boxes = outputs[-1][1].detach()
        return tuple(torch.stack(x) for x in zip(*outputs, strict=True))

    def forward(self, images: Tensor, targets: list[dict] | None = None) -> tuple[tuple, dict[str, Tensor]]:
        """The outputs, and losses where there are targets."""
        outputs = self.decode(*self.queries(len(images)), None, self.encode(images))
        return outputs, matching_losses(outputs, targets) if targets else {}


def matching_losses(outputs: tuple[Tensor, Tensor], targets: list[dict]) -> dict[str, Tensor]:
    """Focal, L1 and GIoU losses of all layers, of pairs that cost the least; see DETR and Deformable DETR."""
    labels, boxes = (torch.cat([x[key] for x in targets]) for key in ("labels", "boxes"))
    counts, losses = [len(x["labels"]) for x in targets], {}
    for k, (logits, predicted) in enumerate(zip(*outputs, strict=True)):
        giou = generalized_box_iou(*(box_convert(x, "cxcywh", "xyxy") for x in (predicted.flatten(0, 1), boxes)))
        positive = sigmoid_focal_loss(logits, torch.ones_like(logits)) - sigmoid_focal_loss(logits, 0 * logits)
        cost = 2 * positive[..., labels] + 5 * torch.cdist(predicted, boxes.expand(len(predicted), -1, -1), 1)
        cost = (cost - 2 * giou.view_as(cost)).detach()  # (N, Q, objects of all images)
        pairs = [linear_sum_assignment(c[i]) for i, c in enumerate(cost.cpu().split(counts, 2))]
        image = torch.cat([torch.full((len(query),), i) for i, (query, _) in enumerate(pairs)])
        query = torch.cat([torch.as_tensor(query) for query, _ in pairs])
        first = torch.tensor([0, *counts]).cumsum(0).tolist()
        target = torch.cat([torch.as_tensor(own) + first[i] for i, (_, own) in enumerate(pairs)])
        wanted = torch.zeros_like(logits)
        wanted[image, query, labels[target]] = 1
        overlap = giou.view(*predicted.shape[:2], -1)[image, query, target]
        terms = {
            "class": sigmoid_focal_loss(logits, wanted).sum(),
            "l1": 5 * (predicted[image, query] - boxes[target]).abs().sum(),
            "giou": 2 * (1 - overlap).sum(),
        }
        layer = f"_{k}" if k + 1 < len(outputs[0]) else ""
        losses |= {name + layer: value / max(len(boxes), 1) for name, value in terms.items()}
    return losses


class DenoisingTorchvisionDETR(TorchvisionDETR):
    """The same detector, trained with denoising."""

    def __init__(self, num_classes: int, dim: int = 128, **sizes: int):
        super().__init__(num_classes, dim, **sizes)
        self.denoising = QueryDenoising(DenoisingGenerator(num_classes=num_classes), dim=dim)

    def forward(self, images: Tensor, targets: list[dict] | None = None) -> tuple[tuple, dict[str, Tensor]]:
        """As without denoising; in training with the losses ``dn/class``, ``dn/l1``, ``dn/giou`` and those of all layers."""
        dn = self.denoising(targets)
        content, boxes, mask = dn.prepend(*self.queries(len(images)))
        outputs, dn_outputs = dn.split(self.decode(content, boxes, mask, self.encode(images)))
        return outputs, (matching_losses(outputs, targets) if targets else {}) | dn.losses(dn_outputs)

    @torch.no_grad()
    def check(self, images: Tensor, targets: list[dict]) -> int:
        """Raises LeakError if a query sees a denoising query that it must not see."""
        memory, dn = self.encode(images), self.denoising(targets)
        dn.prepend(*self.queries(len(images)))
        return check_isolation(lambda content, boxes, mask: self.decode(content, boxes, mask, memory), dn)


def make(denoising: bool) -> TorchvisionDETR:
    """The detector of the shapes."""
    return (DenoisingTorchvisionDETR if denoising else TorchvisionDETR)(len(CLASSES))


def predict(model: TorchvisionDETR, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class probabilities (N, Q, P) and boxes (N, Q, 4) of the last layer."""
    logits, boxes = model(images)[0]
    return logits[-1].sigmoid(), boxes[-1]


def losses(model: TorchvisionDETR, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
    """Matching losses, and denoising losses where the model has them."""
    return model(images, targets)[1]


def check(model: DenoisingTorchvisionDETR, images: Tensor, targets: list[dict]) -> int:
    """See DenoisingTorchvisionDETR.check."""
    return model.check(images, targets)


if __name__ == "__main__":
    run(make, losses, predict, check, "A torchvision DETR")
