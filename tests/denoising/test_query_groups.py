"""The table of groups against the paper's rule in words, and other tables."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dn_detr_d2.denoising import QueryGroups
from dn_detr_d2.structures import IsolatedGroups


@given(groups=st.integers(1, 5), copies=st.integers(1, 2), room=st.integers(1, 4), matching=st.integers(0, 5))
def test_slots_are_laid_out_group_by_group_and_copy_by_copy(groups, copies, room, matching):
    layout = QueryGroups.isolated(groups, copies, room)
    written = [(g, c) for g in range(groups) for c in range(copies) for _ in range(room)]
    assert list(zip(layout.group.tolist(), layout.copy.tolist(), strict=True)) == written
    assert (layout.num_groups, layout.num_copies) == (groups, copies)
    assert layout.of_all(matching).tolist() == [g for g, _ in written] + [groups] * matching


def test_another_table_opens_a_group_to_the_matching_queries():
    """Known objects: group 1 is seen by all, group 0 by itself alone; nobody in group 1 looks at group 0."""
    layout = QueryGroups.isolated(2, 1, 2)
    layout.visible[:, 1] = True
    mask = layout.attention_mask(3)
    seen = [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1],
    ]
    assert (~mask).int().tolist() == seen


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_mask_is_where_the_groups_are(device):
    assert QueryGroups.isolated(3, 2, 2, device).attention_mask(4).shape == (16, 16)
    assert QueryGroups.isolated(3, 2, 2, device).attention_mask(4).device == torch.device(device)


def test_groups_that_were_changed_are_no_pattern_any_more():
    assert QueryGroups.isolated(3, 2, 4).pattern == IsolatedGroups(3, 8)
    assert QueryGroups.isolated(3, 2, 4).shown_to_matching().pattern is None
    in_place, moved, replaced = (QueryGroups.isolated(3, 2, 4) for _ in range(3))
    in_place.visible[:, 1] = True
    moved.group[0] = 2
    replaced.visible = torch.ones(4, 4, dtype=torch.bool)
    assert [x.pattern for x in (in_place, moved, replaced)] == [None] * 3
    with torch.inference_mode():
        assert QueryGroups.isolated(3, 2, 4).pattern is None


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3))
def test_the_pattern_is_the_mask(groups, copies, room, matching):
    layout = QueryGroups.isolated(groups, copies, room)
    pattern = layout.pattern
    place = [i // pattern.size for i in range(pattern.number * pattern.size)] + [-1] * matching
    seen = [[a == b or b == -1 for b in place] for a in place]
    assert (~layout.attention_mask(matching)).tolist() == seen
