"""Where DINO's queries come from, against the definition written out cell by cell."""

import math

import pytest
import torch
from naming import naming

from dn_detr_d2 import ConfigError
from dn_detr_d2.modeling import TopKAnchors
from dn_detr_d2.structures import Memory

SHAPES = [(4, 6), (2, 3)]


def make_memory(n=2, dim=8):
    """The second image fills the left half of the batch."""
    padding = torch.zeros(n, 30, dtype=torch.bool)
    padding[1, :24] = (torch.arange(24) % 6) >= 3
    padding[1, 24:] = (torch.arange(6) % 3) >= 2
    ratios = torch.ones(n, 2, 2)
    ratios[1, 0, 0], ratios[1, 1, 0] = 3 / 6, 2 / 3
    return Memory(torch.randn(n, 30, dim), torch.zeros(n, 30, dim), padding, SHAPES, ratios)


def make_source(content="learned", queries=5):
    source = TopKAnchors(num_queries=queries, dim=8, num_classes=3, content=content, denoising=True)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    return source


def slow_proposals(memory, image):
    """[(box, usable)] of every cell, as spec section 1.8 says it."""
    boxes = []
    for level, (height, width) in enumerate(memory.shapes):
        valid_width, valid_height = (memory.valid_ratios[image, level] * torch.tensor([width, height])).tolist()
        for i in range(height):
            for j in range(width):
                box = [(j + 0.5) / valid_width, (i + 0.5) / valid_height, 0.05 * 2**level, 0.05 * 2**level]
                usable = all(0.01 < x < 0.99 for x in box) and not memory.padding[image, len(boxes)]
                boxes.append((box, usable))
    return boxes


def test_the_best_cells_propose_boxes_around_themselves():
    memory, source = make_memory(), make_source()
    queries = source(memory)
    for image in range(2):
        scored = []
        for cell, (box, usable) in enumerate(slow_proposals(memory, image)):
            token = memory.tokens[image, cell] if usable else torch.zeros(8)
            hidden = source.norm(source.project(token))
            delta = source.heads.box_heads[0](hidden)
            refined = [1 / (1 + math.exp(-(d + math.log(x / (1 - x))))) if usable else 1.0
                       for d, x in zip(delta.tolist(), box, strict=True)]  # fmt: skip
            scored.append((source.heads.class_heads[0](hidden).max().item(), refined, usable))
        best = sorted(scored, key=lambda x: -x[0])[:5]
        scores = queries.proposals.logits[0, image].amax(-1)
        torch.testing.assert_close(scores, torch.tensor([x[0] for x in best]))
        for ours, (_, theirs, usable) in zip(queries.boxes[image], best, strict=True):
            if usable:  # those that are not usable are all alike, in any order
                torch.testing.assert_close(ours, torch.tensor(theirs))


def test_anchors_have_no_gradient_but_proposals_have():
    queries = make_source()(make_memory())
    assert not queries.boxes.requires_grad
    assert queries.proposals.boxes.requires_grad
    assert queries.proposals.logits.requires_grad


def test_mixed_selection_learns_contents_and_pure_selection_takes_the_cells():
    memory = make_memory()
    learned, pure = make_source()(memory), make_source("memory")(memory)
    assert learned.content.requires_grad
    assert torch.equal(learned.content[0], learned.content[1])
    assert not pure.content.requires_grad
    assert not torch.equal(pure.content[0], pure.content[1])


def test_an_image_with_fewer_cells_than_queries_has_fewer_queries():
    queries = make_source(queries=50)(make_memory())
    assert queries.content.shape[:2] == queries.boxes.shape[:2] == (2, 30)


@pytest.mark.parametrize(("key", "value", "named"), [
    ("QUERY_SOURCE.CONTENT", "zero", ["QUERY_SOURCE.CONTENT", "zero"]),
    ("QUERY_SOURCE.NUM_PATTERNS", 3, ["NUM_PATTERNS", 0, "TopKAnchors"]),
    ("NUM_QUERIES", 0, ["NUM_QUERIES", 0]),
])  # fmt: skip
def test_keys_that_do_not_go_together_are_refused(toy_model, key, value, named):
    with pytest.raises(ConfigError, match=naming(*named)):
        toy_model("dino", f"MODEL.DN_DETR.{key}", value)


@pytest.mark.parametrize(("decoder", "reaches"), [("LookForwardOnceDecoder", False), ("LookForwardTwiceDecoder", True)])
def test_who_looks_forward_twice(toy_model, decoder, reaches):
    """The box loss of layer 1 alone: does it reach the box head through the reference that layer 0 made?"""
    model = toy_model("dino", "MODEL.DN_DETR.DECODER.NAME", decoder, "MODEL.DN_DETR.DECODER.SHARE_HEADS", False)
    memory = make_memory(dim=64)
    memory.shapes, memory.padding[:] = [(5, 6)], False
    memory.valid_ratios = torch.ones(2, 4, 2)
    memory.shapes = [(4, 5), (2, 3), (1, 3), (1, 1)]
    predictions = model.decoder(model.query_source(memory), memory)
    predictions.boxes[1].sum().backward()
    gradient = model.decoder.heads.box_heads[0].layers[-1].bias.grad
    assert (gradient is not None and bool(gradient.any())) == reaches
