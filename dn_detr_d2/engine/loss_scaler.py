"""The loss scale of fp16, decided on the device."""

import torch
from torch import Tensor


class LossScaler(torch.amp.GradScaler):
    """PyTorch's, whose scale the device can leave as it is, and whose optimizer steps elsewhere.

    PyTorch's ``step`` reads whether a gradient overflows, and its ``update`` lowers the scale whatever the reason is. Here
    only ``scale`` and ``unscale_`` are used as they are; see :meth:`update_unless`.
    """

    def on_device(self, device: torch.device) -> Tensor:
        """() float32 scale of this step without a copy to the host; 0 if scaling is off."""
        return self._scale if self.is_enabled() else torch.zeros((), device=device)

    def update_unless(self, failed: Tensor) -> None:
        """PyTorch's ``update`` after a step, undone where the step has failed for another reason than an overflow.

        Args:
            failed: () bool on the device.
        """
        if not self.is_enabled():
            return
        state = (self._scale, self._growth_tracker)
        before = [x.clone() for x in state]
        self.update()
        for x, kept in zip(state, before, strict=True):
            x.copy_(torch.where(failed, kept, x))
