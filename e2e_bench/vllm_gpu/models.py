"""Small models with random weights, made on the spot."""

from __future__ import annotations

from pathlib import Path

from e2e_bench.demo import tiny_models
from e2e_bench.demo.tiny_models import TinyModel

# Like the demo's small models, with head dimensions that every GPU backend serves.
_COMMON = {
    "vocab_size": tiny_models.VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": tiny_models.MAX_POSITIONS,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GPU_MODELS = (
    TinyModel(
        "gpu-llama",
        "LlamaConfig",
        "AutoModelForCausalLM",
        _COMMON | {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128},
    ),
    TinyModel(
        "gpu-gptoss",
        "GptOssConfig",
        "AutoModelForCausalLM",
        _COMMON
        | {
            "intermediate_size": 256,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
)
tiny_models.MODELS.update({model.name: model for model in _GPU_MODELS})


def make_small(name: str) -> Path:
    """Return the folder of a small model with weights: a key of ``tiny_models.MODELS``."""
    return tiny_models.make(name, tiny_models.cache_folder())
