"""Requests that we write, into a file that both engines' clients read as ``custom``."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import NormalDist

from e2e_bench.serving.loads import SEED, Load, LogNormal, Repeated, Tree

# A word of make_shape's tokenizers, and one of a byte-level tokenizer: a space before it.
WORD = re.compile(r"t\d+|\u0120[a-z]+")
LEAST_TOKENS = 4  # as vLLM's client asks of ShareGPT

Request = tuple[list[str], int]  # words of the prompt, tokens of the output


def write_requests(load: Load, model: Path, path: Path) -> None:
    """Write one request per line, the same at each call.

    vLLM's client reads ``prompt`` and ``output_tokens``, SGLang's ``conversations``, whose answer
    it only counts the tokens of.

    Args:
        load: with ``written``.
        model: folder with the tokenizer whose tokens the words are.
        path: of the file; vLLM wants the ending .jsonl.
    """
    words = one_token_words(model)
    lines = []
    for prompt, output_tokens in make_requests(load, words):
        text = _spell(prompt)
        turns = [{"content": text}, {"content": _spell(words[:1] * output_tokens)}]
        line = {"prompt": text, "output_tokens": output_tokens, "conversations": turns}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))


def one_token_words(model: Path) -> list[str]:
    """Return words that are one token each where a space comes before them, by id."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(filter(WORD.fullmatch, vocabulary), key=vocabulary.__getitem__)
    return [word.removeprefix("\u0120") for word in words]


def make_requests(load: Load, words: Sequence[str]) -> Iterator[Request]:
    """Yield the requests of a load with ``written``; the seed is that of the clients."""
    draws = random.Random(SEED)
    if isinstance(load.written, LogNormal):
        return _log_normal(load, load.written, words, draws)
    if isinstance(load.written, Tree):
        return _tree(load, load.written, words, draws)
    assert isinstance(load.written, Repeated)
    return _repeated(load, load.written, words, draws)


def log_normal_lengths(mean: float, std: float, count: int, most: int) -> list[int]:
    """Return lengths at even quantiles, ascending: few draws would miss the mean of so long a tail.

    Args:
        mean: of the distribution.
        std: its standard deviation.
        count: of lengths.
        most: the longest that is left.
    """
    variance_log = math.log(1 + (std / mean) ** 2)
    normal = NormalDist(math.log(mean) - variance_log / 2, math.sqrt(variance_log))
    exact = (math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count))
    return [min(max(round(one), LEAST_TOKENS), most) for one in exact]


def _log_normal(
    load: Load, shape: LogNormal, words: Sequence[str], draws: random.Random
) -> Iterator[Request]:
    """Inputs and outputs that know nothing of each other, in random order."""
    inputs = log_normal_lengths(load.input_tokens, shape.input_std, load.prompts, shape.most)
    outputs = log_normal_lengths(load.output_tokens, shape.output_std, load.prompts, shape.most)
    draws.shuffle(inputs)
    draws.shuffle(outputs)
    for input_tokens, output_tokens in zip(inputs, outputs, strict=True):
        yield draws.choices(words, k=input_tokens), output_tokens


def _tree(load: Load, tree: Tree, words: Sequence[str], draws: random.Random) -> Iterator[Request]:
    for _ in range(tree.systems):
        system = draws.choices(words, k=tree.system_tokens)
        for _ in range(tree.documents):
            document = draws.choices(words, k=tree.document_tokens)
            for _ in range(load.prompts // (tree.systems * tree.documents)):
                question = draws.choices(words, k=load.input_tokens)
                yield system + document + question, load.output_tokens


def _repeated(
    load: Load, repeated: Repeated, words: Sequence[str], draws: random.Random
) -> Iterator[Request]:
    for _ in range(load.prompts):
        phrase = draws.choices(words, k=repeated.phrase_tokens)
        times = -(-load.input_tokens // repeated.phrase_tokens)
        yield (phrase * times)[: load.input_tokens], load.output_tokens


def _spell(words: Sequence[str]) -> str:
    return "".join(f" {word}" for word in words)
