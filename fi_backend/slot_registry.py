"""Slots by number, so that a custom op can name one: an op takes tensors and numbers only."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

from fi_backend.errors import InvalidInput, contract_message

if TYPE_CHECKING:
    from fi_backend.plan_slot import PlanSlot

_next_handle = itertools.count(1)
_slots: weakref.WeakValueDictionary[int, PlanSlot] = weakref.WeakValueDictionary()


def register_slot(slot: PlanSlot) -> int:
    """Return the number of a new slot; it is never used again and does not keep the slot alive."""
    handle = next(_next_handle)
    _slots[handle] = slot
    return handle


def find_slot(handle: int) -> PlanSlot:
    """Return the slot of a number.

    Raises:
        InvalidInput: its planner is gone.
    """
    slot = _slots.get(handle)
    if slot is None:
        raise InvalidInput(
            contract_message(
                "slot", "a slot of a living StepPlanner", handle, "keep the planner alive"
            )
        )
    return slot
