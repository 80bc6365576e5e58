"""Types of the native core. Tensors cross as addresses (int) and strides (elements)."""

from torch import Tensor

# --- Planner (bindings/bind_plan.cc)

class Band:
    left: int
    right: int
    sink_prefix: int
    def __init__(self, left: int, right: int, sink_prefix: int) -> None: ...

class TileClass:
    def __init__(self, rows: int, kv_tile: int, c_fixed: int, c_tile: int) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def kv_tile(self) -> int: ...
    @property
    def c_fixed(self) -> int: ...
    @property
    def c_tile(self) -> int: ...

class PlanCapacity:
    def __init__(
        self,
        max_requests: int,
        max_tokens: int,
        max_kv_len: int,
        max_nodes: int,
        max_links: int,
        max_shared_tokens: int,
    ) -> None: ...

class PlanLayout:
    @property
    def cta_ptr(self) -> int: ...
    @property
    def first_items(self) -> int: ...
    @property
    def items(self) -> int: ...
    @property
    def units(self) -> int: ...
    @property
    def requests(self) -> int: ...
    @property
    def nodes(self) -> int: ...
    @property
    def node_tiles(self) -> int: ...
    @property
    def links(self) -> int: ...
    @property
    def gathered(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def max_items(self) -> int: ...
    @property
    def max_units(self) -> int: ...
    @property
    def max_node_tiles(self) -> int: ...
    @property
    def num_ctas(self) -> int: ...
    @property
    def max_partial_rows(self) -> int: ...

class PlanConfig:
    def __init__(
        self,
        num_qo_heads: int,
        num_kv_heads: int,
        num_ctas: int,
        band: Band,
        invariant_chunk: int,
        classes: list[TileClass],
        capacity: PlanCapacity,
    ) -> None: ...
    @property
    def classes(self) -> list[TileClass]: ...
    @property
    def forest_bytes(self) -> int: ...
    def layout(self) -> PlanLayout: ...

def cpu_tile_classes() -> list[TileClass]: ...
def node_fixed(rows: int) -> int: ...
def make_plan(
    config: PlanConfig,
    layout: PlanLayout,
    num_requests: int,
    qo_indptr: int,
    kv_len: int,
    kv_len_bytes: int,
    num_nodes: int,
    nodes: list[int],
    plan: int,
) -> int: ...
def make_plan_of_forest(
    config: PlanConfig,
    layout: PlanLayout,
    num_requests: int,
    qo_indptr: int,
    kv_len: int,
    kv_len_bytes: int,
    forest: int,
    plan: int,
) -> int: ...

# --- CPU engine (bindings/bind_cpu.cc)

class KvStrides:
    page: int
    token: int
    head: int
    def __init__(self, page: int, token: int, head: int) -> None: ...

class KvCacheView:
    k: int
    v: int
    k_stride: KvStrides
    v_stride: KvStrides
    num_pages: int
    page_size: int
    dtype: int
    def __init__(self) -> None: ...

class PageTableView:
    entries: int
    indptr: int
    row_index: int
    page_map: int
    row_stride: int
    entry_stride: int
    page_size: int
    slot_divisor: int
    row_index_is_int64: int
    num_rows: int
    def __init__(self) -> None: ...

class HeadShape:
    def __init__(
        self, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, head_dim_vo: int
    ) -> None: ...
    @property
    def num_qo_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim_qk(self) -> int: ...
    @property
    def head_dim_vo(self) -> int: ...

class Scale:
    data: int
    per_head: bool
    def __init__(self, data: int = 0, per_head: bool = False) -> None: ...

class Rotation:
    cos_sin: int
    stride: int
    rotary_dim: int
    interleaved: int
    window: int
    sink_prefix: int
    def __init__(
        self,
        cos_sin: int,
        stride: int,
        rotary_dim: int,
        interleaved: int,
        window: int,
        sink_prefix: int,
    ) -> None: ...

class AttentionParams:
    q: int
    q_stride_token: int
    q_stride_head: int
    q_dtype: int
    out: int
    out_stride_token: int
    out_stride_head: int
    out_dtype: int
    lse: int
    kv: KvCacheView
    table: PageTableView
    heads: HeadShape
    band: Band
    scale: float
    q_scale: Scale
    k_scale: Scale
    v_scale: Scale
    partial: bool
    rotation: Rotation
    plan: int
    layout: PlanLayout
    partial_o: int
    partial_lse: int
    arrivals: int
    def __init__(self) -> None: ...
    def set_classes(self, classes: list[TileClass]) -> None: ...
    def set_variant(
        self,
        stages: list[tuple[int, int, int, int, list[tuple[int, tuple[int, int, int], float]]]],
        softmax: bool,
        sinks: int,
    ) -> None: ...

class MergeParams:
    o: int
    lse: int
    out_o: int
    out_lse: int
    num_states: int
    rows: int
    dim: int
    softmax: bool
    def __init__(self) -> None: ...

def run_attention(params: AttentionParams, num_threads: int) -> None: ...
def merge_states(params: MergeParams, num_threads: int) -> None: ...
def active_isa() -> str: ...
def force_isa(isa: str) -> bool: ...

# --- Variants (bindings/bind_variants.cc)

def find_variant_function(key: str) -> tuple[int, int] | None: ...

# --- Kernels on a GPU (bindings/bind_launch.cc); every function may raise errors.DeviceError

class DeviceInfo:
    @property
    def name(self) -> str: ...
    @property
    def major(self) -> int: ...
    @property
    def minor(self) -> int: ...
    @property
    def num_sms(self) -> int: ...
    @property
    def max_shared_bytes(self) -> int: ...
    @property
    def max_shared_bytes_per_sm(self) -> int: ...
    @property
    def copies_boxes(self) -> bool: ...

class Kernel:
    def __init__(
        self, image: bytes, entry: str, device: int, dynamic_shared_bytes: int
    ) -> None: ...
    def ctas_per_sm(self, threads: int) -> int: ...
    @property
    def num_registers(self) -> int: ...
    @property
    def device(self) -> int: ...

class KernelParams:
    q: int
    out: int
    lse: int
    q_stride_token: int
    q_stride_head: int
    out_stride_token: int
    out_stride_head: int
    kv: KvCacheView
    table: PageTableView
    page_shift: int
    num_qo_heads: int
    num_kv_heads: int
    band: Band
    scale: float
    q_scale: Scale  # reading gives a copy: assign a whole Scale
    k_scale: Scale
    v_scale: Scale
    sinks: int
    out_is_float32: int
    is_partial: int
    plan: int
    layout: PlanLayout
    partial_o: int
    partial_lse: int
    arrivals: int
    rotation: Rotation
    def __init__(self) -> None: ...
    def set_variant_params(self, params: list[tuple[int, tuple[int, int, int], float]]) -> None: ...

class CallTensors:
    # Of q, k, v, out and lse; lse may be None.
    boxes: bool
    def take(
        self,
        params: KernelParams,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor | None,
        scale: float,
        is_partial: bool,
    ) -> int: ...
    def remember(
        self,
        params: KernelParams,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor | None,
        scale: float,
        is_partial: bool,
    ) -> int: ...
    def forget(self) -> None: ...

def device_info(device: int) -> DeviceInfo: ...
def launch_attention(
    kernel: Kernel, params: KernelParams, grid: int, threads: int, stream: int
) -> None: ...

# --- The sm80-class kernel's tiles (bindings/bind_sm80.cc)

class KernelTiles:
    @property
    def classes(self) -> list[TileClass]: ...
    @property
    def stages(self) -> list[int]: ...
    @property
    def warps(self) -> int: ...
    @property
    def ctas_per_sm(self) -> int: ...

def sm80_tiles(
    head_dim_qk: int,
    head_dim_vo: int,
    kv_bytes: int,
    group_size: int,
    max_q_len: int,
    max_requests: int,
    max_shared_bytes_per_sm: int = 233472,
    boxes: bool = False,
) -> KernelTiles: ...
def sm80_shared_bytes(
    head_dim_qk: int,
    head_dim_vo: int,
    kv_bytes: int,
    tiles: list[tuple[int, int, int]],
    warps: int,
    boxes: bool = False,
) -> int: ...
def fits_boxes(head_dim_qk: int, head_dim_vo: int, kv_bytes: int, page_size: int) -> bool: ...

# --- Planner kernel (bindings/bind_plan_kernel.cc)

class PlanKernelParams:
    qo_indptr: int
    kv_len: int
    forest: int
    plan: int
    status: int
    scratch: int
    num_requests: int
    kv_len_is_int64: int
    def __init__(self, config: PlanConfig, layout: PlanLayout) -> None: ...
    @property
    def max_requests(self) -> int: ...
    @property
    def is_invariant(self) -> bool: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def from_start(self) -> bool: ...
    @property
    def is_narrow(self) -> bool: ...
    @property
    def has_nodes(self) -> bool: ...
    @property
    def scratch_bytes(self) -> int: ...
    def __bytes__(self) -> bytes: ...

def launch_plan(
    kernel: Kernel,
    params: PlanKernelParams,
    grid: int,
    threads: int,
    stream: int,
    overlaps: bool,
) -> None: ...

# --- Prefix forest on host and GPU (bindings/bind_forest.cc)

class ForestLayout:
    @property
    def nodes(self) -> int: ...
    @property
    def requests(self) -> int: ...
    @property
    def links(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...

def forest_layout(capacity: PlanCapacity) -> ForestLayout: ...
def find_forest(
    capacity: PlanCapacity,
    num_requests: int,
    qo_indptr: int,
    kv_len: int,
    kv_len_bytes: int,
    table: PageTableView,
    forest: int,
) -> None: ...

class ForestKernelParams:
    qo_indptr: int
    kv_len: int
    scratch: int
    branches: int
    forest: int
    totals: int
    num_requests: int
    kv_len_is_int64: int
    def __init__(self, capacity: PlanCapacity) -> None: ...
    def set_table(self, table: PageTableView) -> None: ...
    @property
    def scratch_bytes(self) -> int: ...
    def __bytes__(self) -> bytes: ...

def launch_forest(
    kernel: Kernel, params: ForestKernelParams, grid: int, threads: int, stream: int
) -> None: ...

# --- append_kv on both engines, merge_states on a GPU (bindings/bind_ops.cc)

class TokenStrides:
    def __init__(self, token: int, head: int) -> None: ...

class RopeParams:
    def __init__(
        self,
        rotary_dim: int,
        is_interleaved: bool,
        cos_sin_dtype: int,
        cos_sin_stride: int,
        num_positions: int,
        positions_are_int64: bool,
    ) -> None: ...

class AppendParams:
    k_stride: TokenStrides
    v_stride: TokenStrides
    q_stride: TokenStrides
    q_out_stride: TokenStrides
    num_tokens: int
    num_kv_heads: int
    num_qo_heads: int
    head_dim_qk: int
    head_dim_vo: int
    kv: KvCacheView
    k_scale_per_head: int
    v_scale_per_head: int
    rope: RopeParams
    def __init__(self, dtype: int) -> None: ...

# Addresses: k, v, cache_k, cache_v, slots, k_scale, v_scale, q, q_out, positions, cos_sin; 0: none.
def append_kv(params: AppendParams, addresses: tuple[int, ...], num_threads: int) -> None: ...
def launch_append(
    kernel: Kernel, params: AppendParams, addresses: tuple[int, ...], stream: int
) -> None: ...

# Addresses: o, lse, out_o, out_lse.
def launch_merge(
    kernel: Kernel,
    addresses: tuple[int, int, int, int],
    num_states: int,
    rows: int,
    dim: int,
    aligned: bool,
    stream: int,
) -> None: ...
