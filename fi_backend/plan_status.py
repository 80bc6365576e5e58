"""What planners report about a step that broke its contract: found on the device, read later."""

from __future__ import annotations

import enum
import logging
import threading
import weakref

import torch
from torch import Tensor

from fi_backend.errors import contract_message

logger = logging.getLogger(__name__)

_SLAB_WORDS = 256


class PlanStatus(enum.IntFlag):
    """Bits of kernels/include/fi/plan/records.h (PlanStatus)."""

    OK = 0
    TOO_MANY_REQUESTS = 1
    TOO_MANY_TOKENS = 2
    KV_TOO_LONG = 4
    BAD_INDPTR = 8
    NODES_DECLINED = 16


_FIND_IT = "set FI_CHECK=1 to be told the step and the request"
_SENTENCES = {
    PlanStatus.TOO_MANY_REQUESTS: contract_message(
        "batch", "at most capacity.max_requests requests", "more, which were left out", _FIND_IT
    ),
    PlanStatus.TOO_MANY_TOKENS: contract_message(
        "qo_indptr", "at most capacity.max_tokens tokens", "more, which were left out", _FIND_IT
    ),
    PlanStatus.KV_TOO_LONG: contract_message(
        "kv_len",
        "lengths from 0 to capacity.max_kv_len",
        "others, which were clamped",
        _FIND_IT,
    ),
    PlanStatus.BAD_INDPTR: contract_message(
        "qo_indptr", "rising counts from 0", "others, which were clamped", _FIND_IT
    ),
    PlanStatus.NODES_DECLINED: contract_message(
        "nodes",
        "sharing within max_nodes, max_links and max_shared_tokens of the capacity",
        "more, whose KV is read once per request",
        "build the planner with a larger capacity",
    ),
}


class StatusReport:
    """The status bits of one planner, and which of them were logged.

    Attributes:
        word: int32 [1], pinned for a planner on a GPU: kernels add bits, the host only reads.
    """

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.word = (
            _borrow_word(self) if is_cuda else torch.zeros(1, dtype=torch.int32, device="cpu")
        )
        self._view = self.word.numpy()
        self._logged = 0

    @property
    def status(self) -> PlanStatus:
        """All bits so far, of the plans that the device has finished."""
        return PlanStatus(int(self._view[0]))

    def add(self, bits: int) -> None:
        """Add the bits of a plan that was made on the host."""
        self._view[0] |= bits

    def log_news(self) -> None:
        """Log a warning for every bit that was not seen before."""
        bits = int(self._view[0])
        if bits == self._logged:
            return
        for flag in PlanStatus(bits & ~self._logged):
            logger.warning(_SENTENCES[flag])
        self._logged = bits


# Words outlive their planners, for a plan in flight may still add bits to one: at worst a later
# planner that borrows the word logs a warning too many.
_free_words: list[Tensor] = []
_lock = threading.Lock()


def _borrow_word(owner: StatusReport) -> Tensor:
    with _lock:
        if not _free_words:
            with torch.inference_mode(False):  # a later owner may be outside that mode
                slab = torch.zeros(_SLAB_WORDS, dtype=torch.int32, device="cpu", pin_memory=True)
            _free_words.extend(slab[i : i + 1] for i in range(_SLAB_WORDS))
        word = _free_words.pop()
    word.zero_()
    weakref.finalize(owner, _free_words.append, word)
    return word
