"""``vllm serve`` with our attention: the OpenAI API, streams, vLLM's benchmark, a full cache."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI
from vllm_engines import Engine, Tokens, random_prompt

from e2e_bench.demo import tiny_models
from e2e_bench.demo.server import MODEL_NAME, Server

# 12 requests of about 200 tokens each, for a cache of 1024.
CROWD = [random_prompt(100 + 7 * i, seed=80 + i) for i in range(12)]
NEW_TOKENS = 60
OPTIONS = (
    *("--max-model-len", "512", "--max-num-seqs", "32", "--max-num-batched-tokens", "512"),
    *("--block-size", "32", "--num-gpu-blocks-override", "33"),
    *("--worker-extension-cls", "fi_backend.integrations.vllm.worker.FiWorkerExtension"),
)
# Engines inside the tests' process turn multiprocessing off; a server wants it.
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}
BENCH = (
    *("bench", "serve", "--backend", "vllm", "--model", MODEL_NAME, "--dataset-name", "random"),
    *("--random-input-len", "64", "--random-output-len", "16", "--random-prefix-len", "100"),
    *("--num-prompts", "16", "--max-concurrency", "8", "--ignore-eos"),
)


@pytest.fixture(scope="module")
def expected() -> Tokens:
    with Engine("llama") as stock:
        return stock.tokens(CROWD, max_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def server(expected: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    del expected  # its engine has stopped before the server starts
    model = tiny_models.make("llama", tiny_models.cache_folder())
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with Server(model, "CUSTOM", log, OPTIONS, ENVIRONMENT) as running:
        yield running


@pytest.fixture
def forwards(server: Server) -> Iterator[None]:
    """Our layers ran in the server's worker during the test."""
    before = server.call_worker("fi_backend_stats")["forwards"]
    yield
    assert server.call_worker("fi_backend_stats")["forwards"] > before


def client(server: Server) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


async def stream(api: AsyncOpenAI, prompt: list[int]) -> AsyncIterator[list[int]]:
    """Token ids of a greedy completion as they come."""
    pieces = await api.completions.create(
        model=MODEL_NAME,
        prompt=prompt,
        max_tokens=NEW_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    async for piece in pieces:
        yield list(piece.choices[0].model_extra["token_ids"])


async def complete(api: AsyncOpenAI, prompt: list[int]) -> list[int]:
    return [token async for piece in stream(api, prompt) for token in piece]


@pytest.mark.usefixtures("forwards")
def test_completion_and_chat_answer(server: Server, expected: Tokens) -> None:
    body = {"model": MODEL_NAME, "temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    answer = server.post("/v1/completions", body | {"prompt": CROWD[0], "return_token_ids": True})
    assert answer["choices"][0]["token_ids"] == expected[0]
    messages = [{"role": "user", "content": "def main():"}]
    answer = server.post("/v1/chat/completions", body | {"messages": messages})
    assert answer["usage"]["completion_tokens"] == NEW_TOKENS


@pytest.mark.usefixtures("forwards")
def test_streams_under_preemption(server: Server, expected: Tokens) -> None:
    before = server.metric("vllm:num_preemptions_total")

    async def ask() -> Tokens:
        async with client(server) as api:
            return list(await asyncio.gather(*(complete(api, prompt) for prompt in CROWD)))

    assert asyncio.run(ask()) == expected
    assert server.metric("vllm:num_preemptions_total") > before, "the cache was not full"


@pytest.mark.usefixtures("forwards")
def test_a_client_that_hangs_up_leaves_the_others_right(server: Server, expected: Tokens) -> None:
    async def hang_up(api: AsyncOpenAI, prompt: list[int]) -> list[int]:
        pieces = stream(api, prompt)
        async for _ in pieces:
            break
        await pieces.aclose()
        return []

    async def ask() -> Tokens:
        async with client(server) as api, client(server) as leaver:
            calls = [complete(api, CROWD[i]) for i in range(6)]
            calls += [hang_up(leaver, CROWD[i]) for i in range(6, 9)]
            return list(await asyncio.gather(*calls))

    assert asyncio.run(ask()) == [*expected[:6], [], [], []]


@pytest.mark.usefixtures("forwards")
def test_vllms_own_benchmark(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *BENCH]
    command += ["--base-url", server.url, "--tokenizer", str(server.model)]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert re.search(r"Successful requests:\s+16\b", done.stdout), done.stdout + done.stderr


def test_the_log_says_who_serves_attention(server: Server) -> None:
    log: Any = server.log.read_text()
    assert log.count("fi_backend serves attention on the CPU") == 1
    assert "Cannot use" not in log
