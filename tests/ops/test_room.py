"""Where an input is put together: side by side in one matrix, or each part by itself."""

from __future__ import annotations

import torch

from octavo.ops.room import Room

LIKE = torch.empty(0, dtype=torch.float64)


def test_joined_it_is_one_matrix_into_which_parts_are_written_or_copied() -> None:
    room, x = Room([2, 3], 4, 5, LIKE, joined=True), torch.rand(5, 3).double()
    room.add().fill_(1)
    room.put(x)
    room.beside.fill_(2)
    assert room.whole.dtype == torch.float64
    assert torch.equal(room.whole, torch.cat([torch.ones(5, 2), x, torch.full((5, 4), 2.0)], dim=1))
    assert [part.data_ptr() - room.whole.data_ptr() for part in room.parts] == [0, 2 * 8]
    kept = room.kept()
    assert torch.equal(kept, room.beside)
    assert kept.untyped_storage().nbytes() == 5 * 4 * 8  # and not the whole


def test_by_itself_a_part_that_stands_somewhere_is_taken_as_it_is() -> None:
    room, x = Room([2, 3], 4, 5, LIKE, joined=False), torch.rand(5, 3)
    assert room.add().shape == (5, 2)
    room.put(x)
    assert room.parts[1] is x
    assert room.parts[0].is_contiguous()
    assert room.kept().shape == (5, 4)
    assert room.kept().untyped_storage().nbytes() == 5 * 4 * 8
