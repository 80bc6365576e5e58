"""The headers that generated source reaches: their text, and the hash that enters cache keys.

A process reads each header once. What it hashes is what it hands to NVRTC, so that a header edited
meanwhile cannot put code of the new text under the key of the old.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

INCLUDE_ROOT = Path(__file__).parents[1] / "include"
_INCLUDE = re.compile(r'^#include "(fi/[^"]+)"', re.MULTILINE)


def reachable_headers(source: str) -> Mapping[str, str]:
    """Return the text of all headers of fi/ that the source reaches, by name such as fi/a/b.h."""
    return _closure(tuple(_INCLUDE.findall(source)))


def headers_hash(source: str) -> str:
    """Return the hash of all headers of fi/ that the source reaches."""
    return _closure_hash(tuple(_INCLUDE.findall(source)))


def forget_headers() -> None:
    """Read the headers anew on next use, as a new process would."""
    for function in (_read, _closure, _closure_hash):
        function.cache_clear()


@cache
def _read(name: str) -> str:
    return (INCLUDE_ROOT / name).read_text()


@cache
def _closure(names: tuple[str, ...]) -> Mapping[str, str]:
    seen: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen[name] = _read(name)
            waiting += _INCLUDE.findall(seen[name])
    return MappingProxyType(seen)


@cache
def _closure_hash(names: tuple[str, ...]) -> str:
    text = json.dumps(dict(_closure(names)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
