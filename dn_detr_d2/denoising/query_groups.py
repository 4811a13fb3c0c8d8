"""Which denoising query belongs to which group, and which group may see which: the attention mask comes from a table.

Shapes: G groups, D denoising queries, Q matching queries.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..structures import IsolatedGroups


@dataclass
class QueryGroups:
    """The places on the query axis and what they may see of each other.

    Groups are laid out one after the other; within a group come the first copies of all objects, then the second ones.

    Attributes:
        group: (D,) int64 in [0, G).
        copy: (D,) int64, which copy of its object inside the group; 0 is the one that restores it.
        visible: (G + 1, G + 1) bool table [group of the query, group of the key]; the last row and column stand for the
            matching queries.
        num_copies: copies of an object in a group.
        made_as: what :meth:`isolated` has made, see :attr:`pattern`.
    """

    group: Tensor
    copy: Tensor
    visible: Tensor
    num_copies: int = 1
    made_as: tuple | None = None

    @classmethod
    def isolated(
        cls, num_groups: int, copies: int, room: int, device: torch.device | str | None = None
    ) -> "QueryGroups":
        """The layout of DN-DETR (Eq. 8-9): *a denoising key is visible to its own group only*, a matching key to all.

        Args:
            num_groups: G.
            copies: of an object in a group.
            room: objects that a group has room for; D = G * copies * room.
            device: of the tensors.
        """
        visible = torch.eye(num_groups + 1, dtype=torch.bool, device=device)
        visible[:, -1] = True
        slot = torch.arange(num_groups * copies * room, device=device)
        group = slot // (copies * room)
        made_as = None
        if not visible.is_inference():  # those do not count their changes
            pattern = IsolatedGroups(num_groups, copies * room)
            made_as = (pattern, *((x, x._version) for x in (group, visible)))
        return cls(group, slot // room % copies, visible, copies, made_as)

    @property
    def pattern(self) -> IsolatedGroups | None:
        """Number and size of the groups where all is as :meth:`isolated` has made it, else None; reads no device."""
        if self.made_as is None:
            return None
        pattern, *made = self.made_as
        now = (self.group, self.visible)
        return pattern if all(x is y and x._version == n for x, (y, n) in zip(now, made, strict=True)) else None

    def shown_to_matching(self) -> "QueryGroups":
        """The same places with a table in which matching queries see all groups: known objects (DN-DETR, TPAMI 2024).

        Groups still do not see each other.
        """
        visible = self.visible.clone()
        visible[-1] = True
        return replace(self, visible=visible)

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.visible) - 1

    def of_all(self, num_matching: int) -> Tensor:
        """(D + Q,) group of each query on the axis, G for matching queries."""
        return torch.cat([self.group, self.group.new_full((num_matching,), self.num_groups)])

    def attention_mask(self, num_matching: int) -> Tensor:
        """(D + Q, D + Q) bool self-attention mask [query, key], True = blocked."""
        group = self.of_all(num_matching)
        return ~self.visible[group[:, None], group]
