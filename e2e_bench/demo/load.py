"""Concurrent streams against a server, and the figures that users feel."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from openai import AsyncOpenAI

from e2e_bench.demo.server import MODEL_NAME, Server


@dataclass
class Stream:
    """One greedy completion.

    Attributes:
        tokens: generated token ids.
        text: what they spell.
        sent_s: when the request left, on time.perf_counter.
        arrivals_s: when each piece of the answer came.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    sent_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """What several waves of streams measured.

    Attributes:
        tokens_per_s: generated tokens of all streams per second of wall time.
        ttft_ms: time to first token, median over streams.
        ttft_worst_ms: same, of the slowest stream.
        itl_ms: time between two tokens of a stream, its mean, median over streams. Tokens reach a
            client in bursts, so single gaps say little.
        itl_worst_ms: same, of the slowest stream.
    """

    tokens_per_s: float
    ttft_ms: float
    ttft_worst_ms: float
    itl_ms: float
    itl_worst_ms: float


def run_wave(server: Server, prompts: Sequence[str], new_tokens: int) -> list[Stream]:
    """Send all prompts at once and return their streams, in order."""
    return asyncio.run(_run_wave(server, prompts, new_tokens))


async def _run_wave(server: Server, prompts: Sequence[str], new_tokens: int) -> list[Stream]:
    address = f"{server.url}/v1"
    async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:
        return list(await asyncio.gather(*(_stream(client, p, new_tokens) for p in prompts)))


async def _stream(client: AsyncOpenAI, prompt: str, new_tokens: int) -> Stream:
    result = Stream(sent_s=time.perf_counter())
    pieces = await client.completions.create(
        model=MODEL_NAME,
        prompt=prompt,
        max_tokens=new_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    async for piece in pieces:
        choice = piece.choices[0]
        result.arrivals_s.append(time.perf_counter())
        result.tokens += (choice.model_extra or {}).get("token_ids") or []
        result.text += choice.text
    return result


def figures(waves: Sequence[Sequence[Stream]]) -> Figures:
    """Return the figures of waves that ran one after the other."""
    streams = [stream for wave in waves for stream in wave]
    wall_s = sum(
        max(s.arrivals_s[-1] for s in wave) - min(s.sent_s for s in wave) for wave in waves
    )
    first_ms = [1e3 * (s.arrivals_s[0] - s.sent_s) for s in streams]
    gap_ms = [
        1e3 * (s.arrivals_s[-1] - s.arrivals_s[0]) / max(len(s.tokens) - 1, 1) for s in streams
    ]
    return Figures(
        tokens_per_s=sum(len(s.tokens) for s in streams) / wall_s,
        ttft_ms=statistics.median(first_ms),
        ttft_worst_ms=max(first_ms),
        itl_ms=statistics.median(gap_ms),
        itl_worst_ms=max(gap_ms),
    )
