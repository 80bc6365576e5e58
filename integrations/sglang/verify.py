"""Trees of drafted tokens: SGLang's mask becomes one row of bits per token."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


class TreeBits:
    """Which drafted tokens of its request each drafted token sees, at an address that stays.

    Args:
        max_requests: of a step.
        drafts: tokens of a request that are verified at once; 0: there is no verification.
        device: of the model.

    Attributes:
        square_mask: bool [max_requests * drafts * drafts], for SGLang to fill where it can: one
            [drafts, drafts] per request, without the tokens before.
    """

    def __init__(self, max_requests: int, drafts: int, device: torch.device) -> None:
        words = -(-drafts // WORD_BITS)
        self._drafts = drafts
        self._bits = torch.zeros(max_requests * drafts, words, dtype=torch.int32, device=device)
        numel = max_requests * drafts * drafts
        self.square_mask = torch.zeros(numel, dtype=torch.bool, device=device)
        token = torch.arange(drafts, device=device)
        self._causal = token <= token[:, None]
        weights = torch.ones(words * WORD_BITS, dtype=torch.int64, device=device)
        self._weights = weights << (torch.arange(words * WORD_BITS, device=device) % WORD_BITS)

    def fill(self, mask: Tensor | None, seq_lens: Tensor) -> Tensor:
        """Return int32 [requests * drafts, words], filled in stream order.

        Args:
            mask: bool, flat; request after request [drafts, seq_len + drafts], and padded requests
                may be missing; or ``square_mask``; None: drafts are chains.
            seq_lens: int64 [requests] device, tokens before the drafted ones.
        """
        requests, drafts = seq_lens.numel(), self._drafts
        if mask is None or mask.numel() == 0:
            seen = self._causal.expand(requests, drafts, drafts)
        elif mask.data_ptr() == self.square_mask.data_ptr():
            seen = mask[: requests * drafts * drafts].view(requests, drafts, drafts)
        else:
            width = seq_lens.long() + drafts
            begin = drafts * (width.cumsum(0) - width)
            token = torch.arange(drafts, device=seq_lens.device)
            row = begin[:, None] + token * width[:, None]  # [requests, drafts]
            index = row[:, :, None] + seq_lens[:, None, None] + token
            seen = mask[index.clamp_(max=mask.numel() - 1)].bool()
        words = self._bits.shape[1]
        padded = torch.nn.functional.pad(seen, (0, words * WORD_BITS - drafts))
        packed = (padded * self._weights).view(requests * drafts, words, WORD_BITS).sum(-1)
        own = self._bits[: requests * drafts]
        # The highest bit is the sign of an int32.
        own.copy_(torch.where(packed >= 1 << 31, packed - (1 << 32), packed))
        return own
