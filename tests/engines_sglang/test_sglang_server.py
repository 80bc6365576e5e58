"""``sglang.launch_server --attention-backend fi``, as the demo starts it."""

from __future__ import annotations

from pathlib import Path

from e2e_bench.demo import tiny_models
from e2e_bench.demo.load import run_wave
from e2e_bench.demo.run_demo import ENGINES, wave_prompts
from e2e_bench.demo.server import SglangServer


def test_a_server_streams_through_our_attention(tmp_path: Path) -> None:
    engine = ENGINES["sglang"]
    model = tiny_models.make("demo", tiny_models.cache_folder())
    with SglangServer(model, engine.ours, tmp_path / "server.log") as server:
        assert server.ready_s > 0
        first, again = (run_wave(server, wave_prompts(0)[:3], 6) for _ in range(2))
        counts = server.counts()
    assert [len(stream.tokens) for stream in first] == [6, 6, 6]
    assert [stream.tokens for stream in again] == [stream.tokens for stream in first]
    assert counts["forwards"] > 0 and counts["decode_steps"] > 0
    assert 0 < counts["saved_kv_tokens"] < counts["kv_tokens"]
