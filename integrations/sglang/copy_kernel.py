"""The kernel that copies the rows of a step's requests out of ``req_to_token``.

Triton compiles annotations too, and knows its own alone: arguments of kernels have none.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tables import StepRequests

# Pages that a program copies at a time, and programs of a request: 8 Ki pages in one round.
BLOCK = 1024
PROGRAMS = 8


@triton.jit
def fi_copy_rows(
    own,
    slots,
    rows,
    qo_indptr,
    kv_len,
    begin,
    slot_map,
    own_stride,
    slot_stride,
    window_left,
    page_size: tl.constexpr,
    block: tl.constexpr,
):
    """Copy one request's pages; see ``tables.copy_rows``."""
    request = tl.program_id(0)
    source = slots + tl.load(rows + request).to(tl.int64) * slot_stride
    if begin is not None:
        source += tl.load(begin + request)
    target = own + request.to(tl.int64) * own_stride
    tokens = tl.load(kv_len + request)
    first = 0
    if window_left >= 0:
        queries = tl.load(qo_indptr + request + 1) - tl.load(qo_indptr + request)
        first = tl.maximum(tokens - queries - window_left, 0).to(tl.int32) // page_size
    last = (tokens.to(tl.int32) + page_size - 1) // page_size
    for at in range(first + tl.program_id(1) * block, last, tl.num_programs(1) * block):
        page = at + tl.arange(0, block)
        held = page < last
        entry = tl.load(source + page.to(tl.int64) * page_size, mask=held, other=0)
        if slot_map is not None:
            entry = tl.load(slot_map + entry, mask=held, other=0).to(tl.int32)
        tl.store(target + page, entry, mask=held)


def launch_copy(
    own: Tensor,
    slots: Tensor,
    step: StepRequests,
    page_size: int,
    slot_map: Tensor | None,
    window_left: int | None,
) -> None:
    """Enqueue the kernel on the current stream; arguments are those of ``tables.copy_rows``."""
    if step.rows.numel() == 0:
        return
    fi_copy_rows[step.rows.numel(), PROGRAMS](
        own,
        slots,
        step.rows,
        step.qo_indptr,
        step.kv_len,
        step.begin,
        slot_map,
        own.stride(0),
        slots.stride(0),
        -1 if window_left is None else window_left,
        page_size=page_size,
        block=BLOCK,
    )
