"""The class that vLLM asks what the backend can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

from fi_backend import AttentionConfig, why_not

from . import OWN_NAME, support
from .impl import FiAttentionImpl
from .metadata import StepMetadataBuilder

if TYPE_CHECKING:
    from vllm.v1.kv_cache_layout import KVCacheLayout


class FiBackend(AttentionBackend):
    """fi_backend under vLLM's name for third-party backends."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        name for name in support.KV_DTYPES if name is not None
    ]

    @staticmethod
    def get_name() -> str:
        """Return the name of vLLM's enum member: the engine looks it up again by this name."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FiAttentionImpl]:
        """Return the class of a layer."""
        return FiAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        """Return the class that plans a step."""
        return StepMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Return that pages of any size are read."""
        return [MultipleOf(1)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Return the shape of a layer's cache, K and V stacked per page (vLLM before 0.32)."""
        return (num_blocks, 2, block_size, num_kv_heads, head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Return the order of that shape in memory: pages first, heads before tokens.

        A head's tokens of a page then lie together (vLLM before 0.32).
        """
        return (1, 0, 2, 4, 3, 5) if include_num_layers_dimension else (0, 1, 3, 2, 4)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return all layouts: kernels read strides. Best first: a head's tokens lie together."""
        from vllm.v1.kv_cache_layout import KVCacheLayout  # not before 0.32

        best = KVCacheLayout.LBHNC
        return (best, *(layout for layout in KVCacheLayout if layout is not best))

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Return whether the kernels serve this head dimension."""
        config = AttentionConfig(
            num_qo_heads=1,
            num_kv_heads=1,
            head_dim_qk=head_size,
            dtype=torch.bfloat16,
            device=current_platform.device_type,
            # vLLM asks NVML, which leaves this process fit to be forked.
            compute_capability=current_platform.get_device_capability(),
        )
        return not why_not(config)

    @classmethod
    def supports_sink(cls) -> bool:
        """Return that learned sinks are served."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Return that windows are served."""
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Return that bidirectional attention is served."""
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Return that a request's bits can be kept independent of its neighbours."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Return that the layout of the cache is not known to vLLM's connectors."""
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Return whether this kind of layer is served."""
        return attn_type in support.SERVED_ATTN_TYPES

    @classmethod
    def validate_configuration(cls, *args: Any, **fields: Any) -> list[str]:
        """Return every reason why a layer is not served; vLLM refuses to start if there are any."""
        return support.selection_reasons(current_platform.device_type, fields)


class NamedFiBackend(FiBackend):
    """fi_backend under its own name."""

    @staticmethod
    def get_name() -> str:
        """Return the name of vLLM's enum member."""
        return OWN_NAME
