"""What the demo computes from the streams that it received."""

from __future__ import annotations

from e2e_bench.demo.load import Stream, figures
from e2e_bench.demo.run_demo import Outcome, differences, wave_prompts


def stream(tokens: list[int], sent: float, arrivals: list[float]) -> Stream:
    return Stream(tokens, "", sent, arrivals)


def test_figures_of_two_waves() -> None:
    first = [
        stream([1, 2, 3], 10.0, [10.1, 10.2, 10.3]),
        stream([4, 5, 6], 10.0, [10.2, 10.2, 10.6]),  # the last two tokens came in a burst
    ]
    second = [stream([7, 8, 9], 20.0, [20.3, 20.5, 20.7])]
    result = figures([first, second])
    assert round(result.tokens_per_s, 6) == round(9 / (0.6 + 0.7), 6)
    assert (round(result.ttft_ms), round(result.ttft_worst_ms)) == (200, 300)
    assert (round(result.itl_ms), round(result.itl_worst_ms)) == (200, 200)


def outcome(*waves: list[Stream]) -> Outcome:
    return Outcome(list(waves), figures(waves), None, [])


def test_differences_name_stream_and_token() -> None:
    def wave(*tokens: list[int]) -> list[Stream]:
        return [stream(ids, 0.0, [1.0, 2.0]) for ids in tokens]

    stock = outcome(wave([1, 2, 3], [4, 5, 6]), wave([7, 8]))
    assert differences(stock, outcome(wave([1, 2, 3], [4, 5, 6]), wave([7, 8]))) == []
    ours = outcome(wave([1, 2, 3], [4, 9, 6]), wave([7]))
    assert differences(stock, ours) == [
        "wave 0, request 1: from token 1 on",
        "wave 1, request 0: from token 1 on",
    ]


def test_prompts_of_a_wave_share_a_prefix_that_no_other_wave_has() -> None:
    waves = [wave_prompts(i) for i in range(3)]
    for prompts in waves:
        assert len(set(prompts)) == len(prompts)
        assert len({prompt[:3000] for prompt in prompts}) == 1
    assert len({prompts[0][:40] for prompts in waves}) == 3
