"""RoPE inside attention: the cache holds K as it was projected, and it turns when it is read.

Sources: RoFormer (Su et al., 2021); positions by slot in a rolling window: StreamingLLM (Xiao et
al., 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fi_backend.errors import InvalidInput, contract_message, require


@dataclass(frozen=True)
class Rotation:
    """How q and K turn before their product.

    A token's slot is its position, or, with a window, its place among those that its query still
    sees: ``sink_prefix`` leading tokens and the last ``window`` ones. Scores depend on differences
    of slots alone, so that between a query and its window nothing changes, and leading tokens stay
    as near as the window is wide, however long the text.

    Attributes:
        cos_sin: name of a float32 tensor parameter [slots, rotary_dim]: the cosines of the
            rotary_dim / 2 pairs, then their sines. With a window it needs as many rows as
            ``sink_prefix + window`` and the longest q_len, else as the longest kv_len.
        interleaved: pairs are neighbours (2i, 2i + 1); else (i, i + rotary_dim / 2).
        window: tokens of the rolling window, the query's own included; 0: slots are positions.
        sink_prefix: leading tokens that stay in slots of their own beside the window.
        multiples: row s of the table holds cosines and sines of s times the angles of row 1, not
            scaled. Kernels may then work angles out from those of nearby slots instead of reading
            all of them. Nothing checks it.
    """

    cos_sin: str = "cos_sin"
    interleaved: bool = False
    window: int = 0
    sink_prefix: int = 0
    multiples: bool = False

    def slots_needed(self, max_q_len: int, max_kv_len: int) -> int:
        """Return how many slots a step with these lengths uses."""
        if self.window == 0:
            return max_kv_len
        return min(max_kv_len, self.sink_prefix + self.window + max_q_len)

    def gone(self, q_pos: torch.Tensor) -> torch.Tensor:
        """Return how many tokens queries at these positions have left behind."""
        kept = self.sink_prefix + self.window
        return (q_pos + 1 - kept).clamp(min=0) if self.window else torch.zeros_like(q_pos)

    def check_table(
        self, table: torch.Tensor, head_dim: int, max_q_len: int, max_kv_len: int
    ) -> None:
        """Check a table of angles against a layer and the lengths of a step.

        Raises:
            InvalidInput: an odd or too large rotary_dim, elements that are not side by side, or too
                few slots.
        """
        name, (slots, dim) = f"params[{self.cos_sin!r}]", table.shape
        rule = f"[slots, rotary_dim] with rotary_dim even and at most {head_dim}"
        valid = dim > 0 and dim % 2 == 0 and dim <= head_dim
        require(valid, name, rule, list(table.shape), "half cosines, half sines")
        hint = "copy it once, outside the step"
        require(table.stride(1) == 1, name, "stride 1 in the last dimension", table.stride(), hint)
        needed = self.slots_needed(max_q_len, max_kv_len)
        if slots < needed:
            hint = "make a longer table, or roll positions with a window"
            raise InvalidInput(contract_message(name, f"at least {needed} slots", slots, hint))

    def rotate(
        self, x: torch.Tensor, slots: torch.Tensor, params: Mapping[str, torch.Tensor | float]
    ) -> torch.Tensor:
        """Return ``x`` turned by the angles of its slots, computed with torch.

        Args:
            x: float32 or float64 [tokens, heads, head_dim].
            slots: integers [tokens].
            params: values of parameters by name.
        """
        table = torch.as_tensor(params[self.cos_sin]).to(x.dtype)[slots][:, None]
        half = table.shape[-1] // 2
        cos, sin = table[..., :half], table[..., half:]
        pairs = slice(0, 2 * half)
        if self.interleaved:
            a, b = x[..., pairs][..., 0::2], x[..., pairs][..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = x[..., :half], x[..., half : 2 * half]
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([turned, x[..., 2 * half :]], -1)

    def products(
        self,
        q_and_k: tuple[torch.Tensor, torch.Tensor],
        positions: tuple[torch.Tensor, torch.Tensor],
        params: Mapping[str, torch.Tensor | float],
        product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        at_once: int,
    ) -> torch.Tensor:
        """Return q . k [heads, queries, tokens] of one request after both have turned, with torch.

        Args:
            q_and_k: float32 or float64 [queries or tokens, heads, head_dim].
            positions: of the queries, of the tokens.
            params: values of parameters by name.
            product: of q and k.
            at_once: queries for which K turns once, by the slots that the first of them sees; 1:
                every query by slots of its own, as they are defined.
        """
        (q, k), (q_pos, kv_pos) = q_and_k, positions
        gone, is_sink = self.gone(q_pos), kv_pos < self.sink_prefix
        rows = []
        for begin in range(0, len(q_pos), at_once):
            some, base = slice(begin, begin + at_once), gone[begin]
            k_slots = torch.where(is_sink, kv_pos, kv_pos - base)
            k_turned, to_window, to_sinks = (
                self.rotate(x, slots.clamp(min=0), params)  # below 0: seen by nobody
                for x, slots in (
                    (k, k_slots),
                    (q[some], q_pos[some] - base),
                    (q[some], q_pos[some] - gone[some]),
                )
            )
            far, near = product(to_sinks, k_turned), product(to_window, k_turned)
            rows.append(torch.where(is_sink, far, near))
        return torch.cat(rows, 1) if rows else q.new_zeros(q.shape[1], 0, len(kv_pos))
