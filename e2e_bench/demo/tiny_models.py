"""Random-weight models of a few million parameters, made offline in seconds.

They have the attention of their big relatives (grouped heads, windows, soft caps, sinks, ALiBi),
with weights scaled so that attention logits and output logits are well spread: greedy tokens then
depend on every part of the attention and are separated by far more than rounding.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 2048
MAX_POSITIONS = 4096
END_OF_TEXT = "<|endoftext|>"
HEARD_SECONDS = 2
# What SGLang begins a transcript with, behind the words of the other models.
TRANSCRIPT_WORDS = ("<|en|>", "<|transcribe|>", "<|notimestamps|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Standard deviation of a projection's output for a normalised input: attention logits then have a
# standard deviation of about kGain^2 = 1.6 and a row of a thousand keys a maximum of about 5.
GAIN = 1.28


@dataclass(frozen=True)
class TinyModel:
    """One model.

    Attributes:
        name: folder name.
        config_class: configuration class of the transformers library.
        auto_class: class of the transformers library that makes the weights.
        settings: what the configuration gets.
        norm_weights: mean weight of the norms whose name contains the key. Where input and output
            embedding are one, the layers must outweigh the embedding in the residual stream, or
            the model repeats its last token.
        gains: factors for the matrices whose name contains the key. A second matrix after an
            activation of one sign adds the same vector to every token, which must stay small.
        hears: the model takes HEARD_SECONDS of sound, and has Whisper's processor.
    """

    name: str
    config_class: str
    auto_class: str
    settings: dict[str, Any]
    norm_weights: Mapping[str, float] = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)
    hears: bool = False


def _decoder(**settings: Any) -> dict[str, Any]:
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return common | settings


_GEMMA = {
    "query_pre_attn_scalar": 64,
    "head_dim": 64,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}
_GEMMA_NORMS = {"post_attention_layernorm": 16.0, "post_feedforward_layernorm": 16.0}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2

MODELS = {
    model.name: model
    for model in (
        TinyModel("llama", "LlamaConfig", "AutoModelForCausalLM", _decoder()),
        TinyModel(
            "demo",
            "LlamaConfig",
            "AutoModelForCausalLM",
            _decoder(
                hidden_size=512,
                intermediate_size=1024,
                num_hidden_layers=6,
                num_attention_heads=16,
                num_key_value_heads=4,
                head_dim=64,
            ),
        ),
        TinyModel("llama-head16", "LlamaConfig", "AutoModelForCausalLM", _decoder(head_dim=16)),
        TinyModel(
            "deepseek",
            "DeepseekV3Config",
            "AutoModelForCausalLM",
            _decoder(
                num_hidden_layers=2,
                first_k_dense_replace=2,
                num_key_value_heads=8,
                q_lora_rank=None,
                kv_lora_rank=64,
                qk_nope_head_dim=32,
                qk_rope_head_dim=16,
                v_head_dim=32,
            ),
        ),
        TinyModel(
            "qwen3",
            "Qwen3Config",
            "AutoModelForCausalLM",
            _decoder(head_dim=64, num_attention_heads=4, num_key_value_heads=1),
        ),
        TinyModel(
            "gemma2",
            "Gemma2Config",
            "AutoModelForCausalLM",
            _decoder(
                **_GEMMA,
                hidden_act="gelu_pytorch_tanh",  # by its old name, for SGLang 0.5.16
                sliding_window=96,
                attn_logit_softcapping=3.0,
                layer_types=_ALTERNATING,
            ),
            _GEMMA_NORMS,
        ),
        TinyModel(
            "gemma3",
            "Gemma3TextConfig",
            "AutoModelForCausalLM",
            _decoder(
                **_GEMMA,
                sliding_window=64,
                layer_types=["sliding_attention"] * 3 + ["full_attention"],
            ),
            _GEMMA_NORMS,
        ),
        TinyModel(
            "gptoss",
            "GptOssConfig",
            "AutoModelForCausalLM",
            _decoder(
                intermediate_size=256,
                num_local_experts=4,
                num_experts_per_tok=2,
                sliding_window=128,
                layer_types=_ALTERNATING,
            ),
        ),
        TinyModel(
            "bloom",
            "BloomConfig",
            "AutoModelForCausalLM",
            {
                "vocab_size": VOCAB_SIZE,
                "hidden_size": 192,
                "n_layer": 3,
                "n_head": 6,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "pad_token_id": 0,
                "tie_word_embeddings": True,
            },
            norm_weights={"word_embeddings_layernorm": 0.1},
            gains={"dense_4h_to_h": 0.5},
        ),
        TinyModel(
            "gemma4",
            "Gemma4TextConfig",
            "AutoModelForCausalLM",
            _decoder(
                **_GEMMA | {"query_pre_attn_scalar": None},
                num_hidden_layers=6,
                num_kv_shared_layers=2,
                sliding_window=64,
                layer_types=_ALTERNATING + _ALTERNATING[:2],
                hidden_size_per_layer_input=32,
                vocab_size_per_layer_input=VOCAB_SIZE,
                per_layer_config={},
            ),
            _GEMMA_NORMS,
        ),
        TinyModel(
            "llama4",
            "Llama4TextConfig",
            "AutoModelForCausalLM",
            _decoder(
                num_local_experts=2,
                num_experts_per_tok=1,
                intermediate_size_mlp=512,
                interleave_moe_layer_step=4,
                attention_chunk_size=128,
                attn_temperature_tuning=False,
                rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
            ),
        ),
        TinyModel(
            "bert",
            "BertConfig",
            "AutoModel",
            {
                "vocab_size": VOCAB_SIZE,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 512,
                "pad_token_id": 0,
            },
        ),
        TinyModel(
            "whisper",
            "WhisperConfig",
            "AutoModelForSpeechSeq2Seq",
            {
                "vocab_size": VOCAB_SIZE + 64,
                "d_model": 256,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 8,
                "decoder_attention_heads": 8,
                "encoder_ffn_dim": 512,
                "decoder_ffn_dim": 512,
                "max_source_positions": 50 * HEARD_SECONDS,
                "max_target_positions": 448,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "pad_token_id": 0,
                "decoder_start_token_id": 1,
                "begin_suppress_tokens": None,
            },
            gains={"out_proj": 8.0, "fc2": 4.0},
            hears=True,
        ),
    )
}


def make(name: str, folder: Path, seed: int = 0) -> Path:
    """Return the folder of a model, making it if it is not there yet.

    Args:
        name: a key of MODELS.
        folder: where models are kept; a model made by another version of this file is not reused.
        seed: of the weights.

    Returns:
        a folder that any engine loads as a local model, tokenizer included.
    """
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:10]
    target = folder.absolute() / f"{name}-{seed}-{version}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "model"
        _save_weights(MODELS[name], made, seed)
        _copy_tokenizer(_tokenizer(folder, version), made)
        if MODELS[name].hears:
            _save_processor(made)
        try:
            made.rename(target)
        except OSError:  # another process was faster
            if not target.exists():
                raise
    return target


def _save_weights(model: TinyModel, target: Path, seed: int) -> None:
    import transformers  # takes seconds: only when a model is made

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = getattr(transformers, model.config_class)(**model.settings)
    torch.manual_seed(seed)
    module = getattr(transformers, model.auto_class).from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            _spread(name, parameter, generator)
            for part, weight in model.norm_weights.items():
                if f"{part}.weight" in name:
                    parameter.add_(weight - 1.0)
            for part, gain in model.gains.items():
                if f"{part}.weight" in name:
                    parameter.mul_(gain)
    module.save_pretrained(target)


def _spread(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if name.endswith("sinks"):  # about as large as the larger logits, so that they matter
        parameter.copy_(noise + 2.0)
    elif ("norm" in name.lower() or "ln_f" in name) and not name.endswith("bias"):
        parameter.add_(0.1 * noise)  # around 1, or around 0 where the model adds 1
        if "q_norm" in name or "k_norm" in name:
            parameter.add_(GAIN - 1.0)
    elif parameter.ndim < 2:
        parameter.copy_(0.02 * noise)
    else:
        # Experts are [expert, in, out]; everything else is [out, in].
        fan_in = parameter.shape[-2] if parameter.ndim == 3 else parameter.shape[-1]
        parameter.copy_(noise * (GAIN / math.sqrt(fan_in)))


def _corpus() -> Iterator[str]:
    """Text that every Python installation has."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py"))[:60]:
        yield path.read_text(encoding="utf-8", errors="ignore")


def _tokenizer(folder: Path, version: str) -> Path:
    target = folder / f"tokenizer-{version}"
    if target.exists():
        return target
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
    )
    fast.chat_template = CHAT_TEMPLATE
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "tokenizer"
        fast.save_pretrained(made)
        try:
            made.rename(target)
        except OSError:
            if not target.exists():
                raise
    return target


def _copy_tokenizer(source: Path, target: Path) -> None:
    for path in source.iterdir():
        shutil.copy(path, target / path.name)


def _save_processor(model: Path) -> None:
    """Add what turns sound into features, and the words that a transcript begins with."""
    from tokenizers import Tokenizer
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizerFast

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens(list(TRANSCRIPT_WORDS))
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT)
    words = WhisperTokenizerFast(tokenizer_object=tokenizer, **names)
    features = WhisperFeatureExtractor(feature_size=80, chunk_length=HEARD_SECONDS)
    WhisperProcessor(features, words).save_pretrained(model)


def cache_folder() -> Path:
    """Return where demo, tests and benchmarks keep models: $FI_BACKEND_MODELS or the checkout."""
    default = Path(__file__).parents[2] / ".cache" / "models"
    return Path(os.environ.get("FI_BACKEND_MODELS", default))
