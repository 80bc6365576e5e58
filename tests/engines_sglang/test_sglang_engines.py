"""Engines beside those of test_sglang_tokens, which stop before these start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sglang.srt.multimodal.processors import whisper
from sglang_engines import OPTIONS, REFERENCE, Engine, random_prompt
from transformers import AutoModelForCausalLM

from e2e_bench.demo import tiny_models


def test_bf16_loses_no_more_than_in_torch_native() -> None:
    """Rounding changes tokens, so compare every prompt token's log-probability with fp32's."""
    prompt = random_prompt(700, seed=95)
    folder = tiny_models.make("llama", tiny_models.cache_folder())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    truth = logits.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    errors = {}
    for backend in (REFERENCE, "fi"):
        with Engine("llama", backend, dtype="bfloat16") as engine:
            errors[backend] = (torch.tensor(engine.prompt_logprobs(prompt)) - truth).abs()
            assert bool(engine.stats()) is (backend == "fi")
    assert 0 < errors["fi"].mean() <= 2 * errors[REFERENCE].mean()
    assert errors["fi"].max() <= 2 * errors[REFERENCE].max()


def test_texts_look_at_what_was_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whisper: cross attention in every decoder layer, encoders of sounds that differ."""
    # Of sound, SGLang decodes files, with libraries that are not needed for samples.
    monkeypatch.setattr(whisper, "load_audio", lambda data: np.frombuffer(data, np.float32))
    draw, rate = np.random.default_rng(3), 16_000
    sounds = []
    for seconds in (0.4, 1.1, 2.0, 1.7, 0.2):
        time = np.arange(round(seconds * rate)) / rate
        tones = sum(np.sin(2 * np.pi * tone * time) for tone in draw.uniform(80, 3000, 4))
        sounds.append((0.2 * tones + 0.02 * draw.standard_normal(time.size)).astype(np.float32))
    # An encoder's tokens are not taken in chunks.
    own = {"skip_tokenizer_init": False, "context_length": None, "enable_mixed_chunk": False}
    tokens = {}
    for backend in (REFERENCE, "fi"):
        with Engine("whisper", backend, chunked_prefill_size=-1, **own) as engine:
            tokens[backend] = engine.heard([sound.tobytes() for sound in sounds])
            counts = engine.stats()
    assert tokens["fi"] == tokens[REFERENCE]
    assert len({tuple(answer) for answer in tokens["fi"]}) == len(sounds), "sounds must matter"
    assert counts["forwards"] == 4 * counts["steps"] and counts["decode_steps"] > 20


def test_an_engine_that_cannot_be_served_says_why(tmp_path: Path) -> None:
    """In a session of its own: SGLang ends all processes where a scheduler does not start."""
    folder = tiny_models.make("llama-head16", tiny_models.cache_folder())
    options = OPTIONS | {"model_path": str(folder), "attention_backend": "fi"}
    script = tmp_path / "script.py"
    code = f"import sglang\nif __name__ == '__main__':\n    sglang.Engine(**{options})\n"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        start_new_session=True,
    )
    assert done.returncode != 0
    expected = (
        "attention_backend: expected a model that fi_backend serves, got head_dim_qk: expected a "
        "multiple of 8 from 32 to 256, got 16; pad the head dimension with zeros; choose one of "
        "SGLang's own with --attention-backend"
    )
    assert expected in done.stdout + done.stderr
