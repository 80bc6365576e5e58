"""What a running worker tells from outside: counts, and pictures of its steps."""

from __future__ import annotations

from pathlib import Path

from vllm_layers import Layer, make_builder, make_step, vllm_layer

from fi_backend.integrations.vllm import reset_stats, stats
from fi_backend.integrations.vllm.worker import FiWorkerExtension


def test_counts_are_a_copy() -> None:
    reset_stats()
    before = stats()
    make_builder([vllm_layer(Layer())]).build(0, make_step([(3, 40), (1, 7)]).common)
    assert before.steps == 0
    counts = FiWorkerExtension().fi_backend_stats()
    assert (counts["steps"], counts["planned_requests"], counts["planned_tokens"]) == (1, 2, 4)
    reset_stats()
    assert set(FiWorkerExtension().fi_backend_stats().values()) == {0}


def test_the_next_step_that_fits_is_drawn_once(tmp_path: Path) -> None:
    worker, builder = FiWorkerExtension(), make_builder([vllm_layer(Layer())])
    wanted = tmp_path / "step.png"
    worker.fi_backend_draw_next(str(wanted), min_requests=2, max_tokens=3)
    for lengths in ([(1, 30)], [(1, 30), (9, 9)]):  # too few requests, too many tokens
        builder.build(0, make_step(lengths).common)
        assert worker.fi_backend_drawn() is None
    builder.build(0, make_step([(1, 30), (2, 9)]).common)
    assert worker.fi_backend_drawn() == str(wanted)
    assert wanted.read_bytes().startswith(b"\x89PNG")
    wanted.unlink()
    builder.build(0, make_step([(1, 30), (2, 9)]).common)
    assert not wanted.exists()
