"""Which reference each rule gives the next layer, and where the gradient of a loss goes."""

import pytest
import torch

from dn_detr_d2.modeling import Detached, LookForwardTwice, Static
from dn_detr_d2.modeling.reference_update import References


def run(rule, layers=3):
    """Gradient of the loss of the last layer with respect to the correction of each layer, and the start's."""
    start = torch.full((1, 1, 4), 0.5, requires_grad=True)
    deltas = [torch.full((1, 1, 4), 0.1 * (i + 1), requires_grad=True) for i in range(layers)]
    references, refined = References(start, start), None
    for delta in deltas:
        refined = references.refined + delta
        entering = references.entering
        references = rule(references, lambda entering=entering, delta=delta: entering + delta)
    grads = torch.autograd.grad(refined.sum(), [start, *deltas], allow_unused=True)
    return refined[0, 0, 0].item(), [0 if g is None else g.flatten()[0].item() for g in grads]


@pytest.mark.parametrize(
    ("rule", "value", "gradients"),
    [
        (Static(), 0.5 + 0.3, [1, 0, 0, 1]),  # every layer corrects the start
        (Detached(), 0.5 + 0.1 + 0.2 + 0.3, [0, 0, 0, 1]),  # a layer is not to blame for the one before
        (LookForwardTwice(), 0.5 + 0.1 + 0.2 + 0.3, [0, 0, 1, 1]),  # but here for one, and for one alone
    ],
)
def test_values_and_gradients(rule, value, gradients):
    found, grads = run(rule)
    assert found == pytest.approx(value)
    assert grads == gradients
