"""Environment of SGLang's engines: no network, this checkout's models."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# At the end: an installed fi_backend must not be shadowed by the checkout's.
sys.path.append(str(Path(__file__).parents[2]))
