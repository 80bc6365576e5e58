"""What a layer does to its logits, as a variant and the values of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, reduce

import torch
from torch import Tensor

from fi_backend.variants import Variant, shipped


class LayerLogits:
    """Soft cap, then ALiBi, then sinks: those that the layer has, in this order.

    Args:
        cap: logits are squeezed into (-cap, cap); None or 0: no cap.
        slopes: ALiBi slope of each query head of this rank; None: no ALiBi.
        sink_logits: [num_heads] parameter that the checkpoint fills later; None: no sinks.
    """

    def __init__(
        self,
        cap: float | None,
        slopes: list[float] | Tensor | None,
        sink_logits: Tensor | None,
    ) -> None:
        self.variant = _variant(cap or None, slopes is not None, sink_logits is not None)
        self._sink_logits = sink_logits
        self._params: dict[str, Tensor | float] = {}
        if slopes is not None:
            self._params["slopes"] = torch.as_tensor(slopes, dtype=torch.float32)

    @property
    def params(self) -> Mapping[str, Tensor | float]:
        """Values of the variant's parameters."""
        if self._sink_logits is not None and "sinks" not in self._params:
            self.bind_weights()
        return self._params

    def bind_weights(self) -> None:
        """Take over sinks that the checkpoint has filled; the kernels want them in fp32.

        Weights that are loaded again go where CUDA graphs read the first ones.
        """
        if self._sink_logits is None:
            return
        bound = self._params.get("sinks")
        if not isinstance(bound, Tensor):
            filled = self._sink_logits.detach().to(torch.float32).contiguous()
            self._params["sinks"] = filled
        elif bound.data_ptr() != self._sink_logits.data_ptr():
            bound.copy_(self._sink_logits.detach())


@cache
def _variant(cap: float | None, has_alibi: bool, has_sinks: bool) -> Variant | None:
    chain: list[Variant] = []
    if cap is not None:
        chain.append(shipped.soft_cap(float(cap)))
    if has_alibi:
        chain.append(shipped.alibi())
    if has_sinks:
        chain.append(shipped.sinks())
    return reduce(Variant.then, chain) if chain else None
