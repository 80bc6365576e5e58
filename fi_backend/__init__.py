"""An attention engine for LLM serving.

``StepPlanner`` turns a step's batch into a plan, ``attention`` runs one layer of it. Everything a
caller needs is in this module; variants are in ``fi_backend.variants``.
"""

try:
    from fi_backend._core import active_isa
except ImportError as error:
    # `fi-backend doctor` still runs, and says why; everything else says it when it is asked for.
    _problem = error

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(name)
        hint = "run `make core` in a checkout; where one hides a wheel, set PYTHONSAFEPATH=1"
        message = f"fi_backend._core: expected the native core, got {_problem}; {hint}"
        raise ImportError(message) from _problem
else:
    from fi_backend.attention import Attention, attention
    from fi_backend.block_sparse import (
        BlockSparse,
        block_sparse,
        compose,
        element_mask,
        shared_prefix,
    )
    from fi_backend.errors import (
        CapacityExceeded,
        CompileFailed,
        DeviceError,
        FiError,
        InvalidInput,
        Unsupported,
        UnsupportedVariant,
    )
    from fi_backend.explaining import explain
    from fi_backend.formats import (
        CAUSAL,
        FULL,
        Band,
        HeadShape,
        KvCacheView,
        Nodes,
        PagedBatch,
        PageTable,
    )
    from fi_backend.layers import Capacity, LayerClass
    from fi_backend.ops import Rope, append_kv, merge_states
    from fi_backend.plan_status import PlanStatus
    from fi_backend.planner import PlanSlot, StepPlanner, workspace_bytes, workspace_size
    from fi_backend.ragged import ragged
    from fi_backend.variants import Variant
    from fi_backend.why_not import AttentionConfig, why_not
    from fi_backend.workspace import Workspace, WorkspaceSize

__all__ = [
    "CAUSAL",
    "FULL",
    "Attention",
    "AttentionConfig",
    "Band",
    "BlockSparse",
    "Capacity",
    "CapacityExceeded",
    "CompileFailed",
    "DeviceError",
    "FiError",
    "HeadShape",
    "InvalidInput",
    "KvCacheView",
    "LayerClass",
    "Nodes",
    "PageTable",
    "PagedBatch",
    "PlanSlot",
    "PlanStatus",
    "Rope",
    "StepPlanner",
    "Unsupported",
    "UnsupportedVariant",
    "Variant",
    "Workspace",
    "WorkspaceSize",
    "active_isa",
    "append_kv",
    "attention",
    "block_sparse",
    "compose",
    "element_mask",
    "explain",
    "merge_states",
    "ragged",
    "shared_prefix",
    "why_not",
    "workspace_bytes",
    "workspace_size",
]
