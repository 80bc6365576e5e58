"""What running attention is on every device: the op, its arguments, and the checks of tensors.

Filling a kernel's whole parameter block for every layer would cost more than a small batch's
attention. What depends on the slot is set once, what depends on the step once per plan, on shapes
once per change of them; what is left per call is a comparison and the addresses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fi_backend import _core
from fi_backend.errors import InvalidInput, contract_message, require
from fi_backend.formats import DTYPE_CODES, PagedBatch, PageTable
from fi_backend.slot_registry import find_slot

if TYPE_CHECKING:
    from fi_backend.layers import LayerClass
    from fi_backend.plan_slot import PlanSlot

NO_SCALE = _core.Scale()
CPU = torch.device("cpu")


class Call(NamedTuple):
    """Arguments of one attention call, as ``attention`` has them; see there.

    Attributes:
        tensors: the variant's open tensor parameters; None: none.
        names: of the parameters, those of ``tensors`` first, then those of ``numbers``: "a,b".
        numbers: the variant's open numbers; None: none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float
    lse: Tensor | None = None
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    partial: bool = False
    tensors: list[Tensor] | None = None
    names: str = ""
    numbers: list[float] | None = None


# Two ops, for torch's dispatcher takes time for each argument of a schema, passed or not; for lists
# and keywords several times as much.
_PLAIN = "int slot, Tensor q, Tensor k, Tensor v, Tensor(a!) out, float scale"
PLAIN_SCHEMA = f"attention_plain({_PLAIN}) -> ()"
ATTENTION_SCHEMA = (
    f"attention({_PLAIN},"
    " Tensor(b!)? lse=None, Tensor? q_scale=None, Tensor? k_scale=None, Tensor? v_scale=None,"
    " bool partial=False, Tensor[]? tensors=None, str names='', float[]? numbers=None) -> ()"
)


def run_attention(handle: int, *arguments: object) -> None:
    """Run one of the ops on the device of the slot; see ``attention``."""
    slot = find_slot(handle)
    slot.launch.run(slot, *arguments)


class SlotLaunch(ABC):
    """The parameter block of one slot, and what it was filled with last."""

    def __init__(self, layer_class: LayerClass, device: torch.device) -> None:
        self.layer_class = layer_class
        self.device = device
        self.planned_band = layer_class.planned_band
        self.kv = _core.KvCacheView()

    @abstractmethod
    def run(self, slot: PlanSlot, *arguments: Any, **_: Any) -> None:
        """Compute one layer of the step that ``slot`` was planned for last.

        Args:
            slot: of the layer's class.
            arguments: the fields of ``Call``, in order; those with defaults may be left out.

        Raises:
            InvalidInput: as ``attention``.
        """

    def prepare(self, table: PageTable) -> None:
        """Get ready for a step with a page table, when it is planned."""
        del table

    def set_strides(self, params: _core.AttentionParams | _core.KernelParams, call: Call) -> None:
        """Take strides and sizes of tensors that were checked."""
        q, k, v, out, kv = call.q, call.k, call.v, call.out, self.kv
        params.q_stride_token, params.q_stride_head = q.stride()[:2]
        params.out_stride_token, params.out_stride_head = out.stride()[:2]
        kv.dtype = DTYPE_CODES[k.dtype]
        kv.k_stride = _core.KvStrides(*k.stride()[:3])
        kv.v_stride = _core.KvStrides(*v.stride()[:3])
        kv.num_pages, kv.page_size = k.shape[:2]


def planned_batch(slot: PlanSlot) -> PagedBatch:
    """Return the step of a slot.

    Raises:
        InvalidInput: there was none yet.
    """
    if slot.batch is None:
        message = contract_message("slot", "a plan", "none", "call planner.plan(batch) first")
        raise InvalidInput(message)
    return slot.batch


def table_view(batch: PagedBatch) -> _core.PageTableView:
    """Return a batch's page table as the kernels take it."""
    table = _core.PageTableView()
    for name, value in batch.page_table.view()._asdict().items():
        setattr(table, name, value)
    return table


def check_tensors(
    call: Call,
    layer_class: LayerClass,
    device: torch.device,
    page_size: int,
    num_tokens: int,
) -> None:
    """Check dtypes, shapes, strides and devices.

    Args:
        call: the arguments.
        layer_class: what the slot was built for.
        device: where the kernel runs.
        page_size: of the page table.
        num_tokens: query tokens of the step; 0 if only the device knows.

    Raises:
        InvalidInput: one of them does not fit.
    """
    q, k, v, out, heads = call.q, call.k, call.v, call.out, layer_class.heads
    require(
        k.dim() == 4 and k.shape[1] == page_size,
        "kv",
        f"pages of {page_size} tokens, as in the page table",
        f"k of shape {tuple(k.shape)}",
        "view the cache with the table's page size",
    )
    rows = q.shape[0] if q.dim() == 3 else 0
    _check("q", q, (None, heads.num_qo_heads, heads.head_dim_qk), (layer_class.dtype,), device)
    require(
        rows >= num_tokens,
        "q",
        f"at least {num_tokens} tokens, those of the planned step",
        rows,
        "plan the step that q belongs to",
    )
    pages = (*k.shape[:2], heads.num_kv_heads)
    _check("k", k, (*pages, heads.head_dim_qk), (layer_class.cache_dtype,), device)
    _check("v", v, (*pages, heads.head_dim_vo), (layer_class.cache_dtype,), device)
    out_dtypes = (layer_class.dtype, torch.float32)
    _check("out", out, (rows, heads.num_qo_heads, heads.head_dim_vo), out_dtypes, device)
    if call.lse is not None:
        _check_lse(call.lse, (rows, heads.num_qo_heads), layer_class, device)


def _check_lse(
    lse: Tensor, shape: tuple[int, int], layer_class: LayerClass, device: torch.device
) -> None:
    softmax = layer_class.variant is None or layer_class.variant.softmax
    hint = "states of such variants add, drop lse"
    require(softmax, "lse", "None without softmax", "a tensor", hint)
    _check("lse", lse, shape, (torch.float32,), device)
    hint = "allocate it with torch.empty"
    require(lse.is_contiguous(), "lse", "a contiguous tensor", describe(lse), hint)


def named_params(call: Call) -> dict[str, Tensor | float | int]:
    """Return the variant's parameters by name."""
    if not call.names:
        return {}
    # Numbers cross the op as floats; an int parameter gets its int back.
    numbers = [int(n) if n.is_integer() else n for n in call.numbers or ()]
    values = [*(call.tensors or ()), *numbers]
    return dict(zip(call.names.split(","), values, strict=True))


def refuse_params(params: dict[str, Tensor | float | int]) -> None:
    """Refuse parameters of a layer class without a variant."""
    require(
        not params,
        "params",
        "none for a layer class without a variant",
        ", ".join(params),
        "give the layer class its variant",
    )


def bind_scale(
    name: str, value: Tensor | None, num_kv_heads: int, device: torch.device = CPU
) -> _core.Scale:
    """Return a scale in memory as the kernels take it; None means 1.

    Raises:
        InvalidInput: not float32 on ``device`` with one element or one per KV head.
    """
    if value is None:
        return NO_SCALE
    count = value.numel()
    fits = value.dtype == torch.float32 and value.device == device and value.is_contiguous()
    if not fits or count not in (1, num_kv_heads):
        rule = f"a contiguous float32 tensor of 1 or {num_kv_heads} elements on {device}"
        hint = "one scale for all heads, or one per KV head"
        raise InvalidInput(contract_message(name, rule, describe(value), hint))
    return _core.Scale(value.data_ptr(), count > 1)


def describe(tensor: Tensor) -> str:
    """Return a tensor's dtype, shape, strides and device, for messages."""
    return (
        f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} with strides"
        f" {list(tensor.stride())} on {tensor.device}"
    )


def _check(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    fits = (
        tensor.dtype in dtypes
        and tensor.device == device
        and tensor.dim() == len(shape)
        and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
        and (tensor.stride(-1) == 1 or tensor.shape[-1] < 2 or tensor.numel() == 0)
    )
    if not fits:
        rule = (
            " or ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(dtypes))
            + f" [{', '.join('tokens' if n is None else str(n) for n in shape)}] on {device},"
            " stride 1 in the last dimension"
        )
        raise InvalidInput(
            contract_message(name, rule, describe(tensor), "pass what the layer class declares")
        )
