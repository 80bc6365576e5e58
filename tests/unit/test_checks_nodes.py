"""Value checks of nodes: every KV position of every request exactly once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fi_backend import checks
from fi_backend.errors import CapacityExceeded, InvalidInput
from fi_backend.formats import Nodes, PagedBatch, PageTable
from fi_backend.planner import Capacity


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Pages of 4. Requests 0, 1, 2 share [0, 8); 0 and 1 also share [8, 12); request 3 shares nothing.
# Row 4 belongs to no request: a matrix row of a coarser format.
FIELDS = {
    "table_row": ints(4, 1),
    "kv_begin": ints(0, 8),
    "kv_end": ints(8, 12),
    "member_ptr": ints(0, 3, 5),
    "members": ints(0, 1, 2, 0, 1),
    "own_begin": ints(12, 12, 8, 0),
}


def make_batch(**changes: torch.Tensor | None) -> PagedBatch:
    table = torch.arange(5 * 4, dtype=torch.int32).view(5, 4)
    fields = FIELDS | changes
    return PagedBatch(
        ints(0, 1, 3, 4, 5), ints(13, 15, 12, 10), PageTable.dense(table, 4), Nodes(**fields)
    )


def test_legal_nodes_pass() -> None:
    batch = make_batch()
    checks.validate(batch, num_pages=20)
    assert sorted(checks.used_entries(batch).page.tolist()) == [0, 0, 1, 1, 2, 2, 2, 3, 3]


def test_forest_without_own_begin_reads_own_rows() -> None:
    """The planner may decline any node, so capacity is no error and whole rows are read."""
    batch = make_batch(own_begin=None)
    checks.validate(batch, Capacity(8, 64, 64), num_pages=20)
    assert checks.used_entries(batch).ids.size == 4 + 4 + 3 + 3 + 2 + 1


def test_used_pages_of_members_start_at_their_own_part() -> None:
    batch = make_batch()
    batch.page_table.entries[0, :3] = -7  # never read: the nodes name rows 4 and 1
    checks.validate(batch, num_pages=20)
    batch.page_table.entries[4, 1] = 99
    with pytest.raises(InvalidInput, match="got 99 at row 4, page 1"):
        checks.validate(batch, num_pages=20)


@dataclass(frozen=True)
class Bad:
    """A change of FIELDS that must be refused, and a pattern of the message."""

    match: str
    changes: dict[str, torch.Tensor]


BAD = [
    Bad("nodes.member_ptr: expected 0 at index 0, got 1", {"member_ptr": ints(1, 3, 5)}),
    Bad("nodes.member_ptr: expected at least 3 at index 2, got 2", {"member_ptr": ints(0, 3, 2)}),
    Bad("nodes.member_ptr: expected 5 at the end", {"member_ptr": ints(0, 3, 4)}),
    Bad(
        r"nodes.members: expected requests in \[0, 4\), got 4 at position 2",
        {"members": ints(0, 1, 4, 0, 1)},
    ),
    Bad(
        r"nodes.kv_begin: expected 0 <= kv_begin < kv_end, got \[8, 8\) at node 1",
        {"kv_end": ints(8, 8)},
    ),
    Bad(r"nodes.kv_begin: expected 0 <= kv_begin < kv_end, got \[-4", {"kv_begin": ints(-4, 8)}),
    Bad(r"nodes.table_row: expected rows in \[0, 5\), got 5 at node 0", {"table_row": ints(5, 1)}),
    Bad(
        "nodes.kv_end: expected at most 10 tokens, the length of row 3, got 12 at node 1",
        {"table_row": ints(4, 3)},
    ),
    Bad(
        "nodes.kv_end: expected at most 16 tokens, the length of row 4, got 20 at node 1",
        {"table_row": ints(4, 4), "kv_end": ints(8, 20)},
    ),
    Bad(
        "nodes.kv_end: expected at most kv_len 13 of member 0, got 14 at node 1",
        {"kv_end": ints(8, 14)},
    ),
    Bad(
        "nodes.kv_begin: expected 8, where the earlier nodes of request 0 end, got 4 at node 1",
        {"kv_begin": ints(0, 4)},
    ),
    Bad(
        "nodes.kv_begin: expected 0, where the earlier nodes of request 3 end, got 8 at node 1",
        {"members": ints(0, 1, 2, 0, 3), "kv_end": ints(8, 9), "own_begin": ints(9, 8, 8, 9)},
    ),
    Bad(
        "nodes.own_begin: expected 8, where the nodes of request 2 end, got 12 at request 2",
        {"own_begin": ints(12, 12, 12, 0)},
    ),
    Bad(
        "nodes.own_begin: expected 0, where the nodes of request 3 end, got 4 at request 3",
        {"own_begin": ints(12, 12, 8, 4)},
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.match[:60])
def test_refusals(bad: Bad) -> None:
    with pytest.raises(InvalidInput, match=bad.match):
        checks.validate(make_batch(**bad.changes))


@pytest.mark.parametrize(
    ("name", "used"), [("max_nodes", 2), ("max_links", 5), ("max_shared_tokens", 7)]
)
def test_nodes_with_own_begin_must_fit(name: str, used: int) -> None:
    limits = {"max_nodes": 2, "max_links": 5, "max_shared_tokens": 7}
    checks.validate(make_batch(), Capacity(8, 64, 64, **limits))
    limits[name] -= 1
    with pytest.raises(CapacityExceeded, match=f"batch: expected {name} <= {used - 1}, got {used}"):
        checks.validate(make_batch(), Capacity(8, 64, 64, **limits))
