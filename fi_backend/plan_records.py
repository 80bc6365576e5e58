"""Numpy dtypes of the records in kernels/include/fi/plan, for reading plans in Python."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fi_backend import _core


def _int32(names: str) -> np.dtype[np.void]:
    return np.dtype([(name, "<i4") for name in names.split()])


HEADER = np.dtype(
    [
        ("total_cost", "<i8"),
        *_int32(
            "num_items num_units num_partial_rows num_requests num_nodes num_node_tiles num_links"
            " num_gathered status"
        ).descr,
        ("reserved", "<i4", (5,)),
    ]
)
WORK_ITEM = _int32(
    "table_row kv_begin kv_end hole_begin hole_end kv_head qo_begin q_pos_begin row_begin num_rows"
    " partial_row unit tile_class request q_len kv_len"
)
MERGE_UNIT = _int32("expected partial_row num_splits num_rows")
NODE_LINK = _int32("node row_offset tile_base tile_class")
PLANNED_REQUEST = np.dtype(
    [
        *_int32("unit_base num_tiles tile_class qo_begin q_len kv_len link_begin link_end").descr,
        ("first_link", NODE_LINK),
    ]
)
PLANNED_NODE = _int32(
    "tile_base num_tiles tile_class gather_begin num_tokens table_row kv_begin kv_end"
)
NODE_TILE = _int32("partial_row num_splits num_rows reserved")
GATHERED_TOKEN = _int32("token q_pos request local")

# Records of kernels/include/fi/plan/forest.h.
FOREST_HEADER = _int32(
    "num_nodes num_links num_tokens status kv_tokens saved_kv_tokens reserved0 reserved1"
)
FOREST_NODE = _int32("table_row kv_begin kv_end num_members num_tokens token_begin parent reserved")
FOREST_REQUEST = _int32("link_begin num_links own_begin reserved")
FOREST_LINK = _int32("node token_offset")

# PlanHeader.status bits.
TOO_MANY_REQUESTS, TOO_MANY_TOKENS, KV_TOO_LONG, BAD_INDPTR, NODES_DECLINED = 1, 2, 4, 8, 16


def plan_arrays(plan: NDArray[np.uint8], layout: _core.PlanLayout) -> dict[str, object]:
    """Return the arrays of a plan, trimmed to their used lengths.

    Args:
        plan: uint8 [layout.total_bytes] host, the bytes of one plan.
        layout: where its arrays lie.
    """
    header = plan[: HEADER.itemsize].view(HEADER)[0]

    def array(offset: int, dtype: np.dtype[np.void] | str, count: int) -> NDArray[np.void]:
        size = np.dtype(dtype).itemsize
        return plan[offset : offset + count * size].view(dtype)

    cta_ptr = array(layout.cta_ptr, "<i4", layout.num_ctas + 1)
    first_items = array(layout.first_items, WORK_ITEM, layout.num_ctas)
    return {
        "header": header,
        "cta_ptr": cta_ptr,
        "first_items": first_items[np.diff(cta_ptr) > 0],
        "items": array(layout.items, WORK_ITEM, int(header["num_items"])),
        "units": array(layout.units, MERGE_UNIT, int(header["num_units"])),
        "requests": array(layout.requests, PLANNED_REQUEST, int(header["num_requests"])),
        "nodes": array(layout.nodes, PLANNED_NODE, int(header["num_nodes"])),
        "node_tiles": array(layout.node_tiles, NODE_TILE, int(header["num_node_tiles"])),
        "links": array(layout.links, NODE_LINK, int(header["num_links"])),
        "gathered": array(layout.gathered, GATHERED_TOKEN, int(header["num_gathered"])),
    }
