"""What sharing prefixes saved in this process."""

from __future__ import annotations

import logging

from ..common.sharing import SharedReads

# vLLM shows the lines of its own loggers only. Not through vLLM: counters are read without it too.
logger = logging.getLogger("vllm.plugins.fi_backend")

shared_reads = SharedReads(logger)
