"""Types of the native core. Tensors cross as addresses (int) and strides (elements)."""

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
    def layout(self) -> PlanLayout: ...

def cpu_tile_classes() -> list[TileClass]: ...
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

class AppendParams:
    k: int
    v: int
    k_stride_token: int
    k_stride_head: int
    v_stride_token: int
    v_stride_head: int
    dtype: int
    slots: int
    num_tokens: int
    heads: HeadShape
    kv: KvCacheView
    k_scale: Scale
    v_scale: Scale
    def __init__(self) -> None: ...

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
def append_kv(params: AppendParams, num_threads: int) -> None: ...
def merge_states(params: MergeParams, num_threads: int) -> None: ...
def active_isa() -> str: ...
def force_isa(isa: str) -> bool: ...

# --- Variants (bindings/bind_variants.cc)

def find_variant_function(key: str) -> tuple[int, int] | None: ...
