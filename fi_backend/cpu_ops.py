"""append_kv and merge_states on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fi_backend import _core
from fi_backend.append_call import AppendCall, addresses_of, check_values, prepare
from fi_backend.errors import InvalidInput, contract_message
from fi_backend.launch import describe


def run_append(*arguments: object) -> None:
    """Run torch.ops.fi_backend.append_kv or rope_append_kv on CPU tensors."""
    call = AppendCall(*arguments)  # type: ignore[arg-type]
    prepared = prepare(call)
    check_values(call, prepared)
    _core.append_kv(prepared.params, addresses_of(call), torch.get_num_threads())


def run_merge(o: Tensor, lse: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    """Run torch.ops.fi_backend.merge_states on CPU tensors."""
    check_states(o, lse)
    out_o, out_lse = torch.empty_like(o[0]), torch.zeros_like(lse[0])
    params = _core.MergeParams()
    params.o, params.lse = o.data_ptr(), lse.data_ptr()
    params.out_o, params.out_lse = out_o.data_ptr(), out_lse.data_ptr()
    params.num_states, params.rows, params.dim = o.shape[0], lse[0].numel(), o.shape[3]
    params.softmax = softmax
    _core.merge_states(params, torch.get_num_threads())
    return out_o, out_lse


def check_states(o: Tensor, lse: Tensor) -> None:
    """Raise InvalidInput for states that merge_states does not take."""
    for name, tensor, ndim in (("o", o, 4), ("lse", lse, 3)):
        fits = (
            tensor.dtype == torch.float32
            and tensor.device == o.device
            and tensor.dim() == ndim
            and tensor.shape[:3] == o.shape[:3]
            and tensor.shape[0] > 0
            and tensor.is_contiguous()
        )
        if fits:
            continue  # sentences take longer than launches
        dims = "states, tokens, heads" + (", dim" if ndim == 4 else "")
        rule = f"contiguous float32 [{dims}] on {o.device}, equal in both"
        raise InvalidInput(
            contract_message(name, rule, describe(tensor), "stack the partial states")
        )
