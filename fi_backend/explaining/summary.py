"""A planned step in a few lines of plain text."""

from __future__ import annotations

from fi_backend.explaining.step import Step

SHOWN_REQUESTS = 16


def summarize(step: Step) -> str:
    """Return the summary of ``step``, without a trailing newline."""
    queries = sum(r.q_len for r in step.requests)
    tokens = sum(r.kv_len for r in step.requests)
    pages = {int(page) for part in step.page_lists() for page in part}
    costs = step.span_costs
    mean = costs.mean() if len(costs) else 0.0
    partial = sum(bar.partial for bar in step.bars)
    lines = [
        f"step    {len(step.requests)} requests, {queries:,} query tokens, {tokens:,} KV tokens"
        f" on {len(pages):,} pages of {step.page_size}",
        f"plan    {len(step.bars):,} work items on {step.num_ctas} CTAs, {partial:,} of them leave"
        f" a partial state, {len(step.merges):,} merges",
    ]
    if mean > 0:
        lines.append(
            f"cost    {costs.sum():,} units, mean span {mean:,.0f},"
            f" longest {costs.max():,} ({costs.max() / mean:.2f} x mean)"
        )
    if step.nodes:
        saved = sum((len(n.members) - 1) * (n.kv_end - n.kv_begin) for n in step.nodes)
        lines.append(
            f"sharing {len(step.nodes)} nodes, up to {1 + max(n.level for n in step.nodes)} levels:"
            f" {saved:,} of {tokens:,} KV tokens need no second read"
        )
    if step.status:
        lines.append(f"status  {step.status}: see PlanStatus in kernels/include/fi/plan/records.h")
    for r, request in enumerate(step.requests[:SHOWN_REQUESTS]):
        chain = " > ".join(f"n{n}" for n in request.nodes)
        lines.append(
            f"  r{r:<4} {request.q_len:>6,} query {request.kv_len:>9,} KV"
            + (f"   shares {chain}, own from {request.own_begin:,}" if chain else "")
        )
    if len(step.requests) > SHOWN_REQUESTS:
        lines.append(f"  and {len(step.requests) - SHOWN_REQUESTS} more")
    return "\n".join(lines)
