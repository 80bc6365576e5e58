"""The largest steps that an engine can ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from fi_backend import Capacity


@dataclass(frozen=True)
class StepLimits:
    """What the planners of a model runner must hold.

    Attributes:
        general: any step.
        decode: steps in which every request has one query token.
        verify: steps in which every request verifies drafted tokens; None without speculation.
    """

    general: Capacity
    decode: Capacity
    verify: Capacity | None

    @classmethod
    def of(cls, runner: Any) -> StepLimits:
        """Return the limits that a model runner's pools and settings set."""
        pool = runner.req_to_token_pool
        # Ranks that share attention work pad a step to a multiple of their number, which divides
        # that of all tensor-parallel ranks: past the pool, where that is none.
        requests = -(-pool.size // num_ranks(runner)) * num_ranks(runner)
        kv_len = pool.req_to_token.shape[1]
        drafts = num_draft_tokens(runner)
        chunk = setting(runner, "schedule", "chunked_prefill_size") or -1
        # Without chunks the last prompt of a step may go past the budget.
        budget = setting(runner, "schedule", "max_prefill_tokens") + kv_len
        tokens = chunk if chunk > 0 else budget
        # Every new token takes a slot of the pool; decodes come on top of a chunk.
        slots = runner.token_to_kv_pool.size + runner.page_size
        tokens = min(tokens + requests * max(drafts, 1), max(slots, requests))
        verify = Capacity(requests, requests * drafts, kv_len, max_q_len=drafts) if drafts else None
        decode = Capacity(requests, requests, kv_len, max_q_len=1)
        return cls(Capacity(requests, tokens, kv_len), decode, verify)

    def with_sharing(self) -> StepLimits:
        """Return the limits of planners that look for shared prefixes."""
        return StepLimits(
            self.general.with_sharing(),
            self.decode.with_sharing(),
            None if self.verify is None else self.verify.with_sharing(),
        )

    def with_requests(self, requests: int) -> StepLimits:
        """Return limits that hold at least this many requests in a step."""
        more = max(0, requests - self.general.max_requests)
        return StepLimits(
            _widened(self.general, more),
            _widened(self.decode, more),
            None if self.verify is None else _widened(self.verify, more),
        )


def _widened(capacity: Capacity, requests: int) -> Capacity:
    tokens = capacity.max_tokens + requests * max(capacity.max_q_len, 1)
    return replace(capacity, max_requests=capacity.max_requests + requests, max_tokens=tokens)


def num_draft_tokens(runner: Any) -> int:
    """Return the tokens of a request that a target model verifies at once; 0: it does not."""
    if runner.is_draft_worker or runner.spec_algorithm.is_none():
        return 0
    return int(setting(runner, "spec", "speculative_num_draft_tokens") or 0)


def drafts_branch(runner: Any) -> bool:
    """Return whether drafted tokens of a request may be a tree; of EAGLE with top-k 1 a chain."""
    algorithm = runner.spec_algorithm
    makes_chains = algorithm.is_eagle() or algorithm.is_standalone()
    return not makes_chains or setting(runner, "spec", "speculative_eagle_topk") != 1


def num_ranks(runner: Any) -> int:
    """Return the tensor-parallel ranks of a model runner."""
    if hasattr(runner, "ps"):  # 0.5.16
        return int(runner.ps.tp_size)
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().tp_size)


def setting(runner: Any, group: str, name: str) -> Any:
    """Return a server argument as SGLang resolved it.

    Args:
        runner: SGLang's ModelRunner.
        group: of settings, and parts of it behind dots, where the runtime context has groups
            (0.5.23); before, server arguments are resolved in place.
        name: of the argument.
    """
    from sglang.srt import runtime_context

    first, *parts = group.split(".")
    get_group = getattr(runtime_context, f"get_{first}", None)
    place = runner.server_args if get_group is None else reduce(getattr, parts, get_group())
    return getattr(place, name)
