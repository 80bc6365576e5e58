"""What sharing prefixes saved in this process."""

from __future__ import annotations

import logging

from ..common.sharing import SharedReads

logger = logging.getLogger("sglang.fi_backend")

shared_reads = SharedReads(logger)
