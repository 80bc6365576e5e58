"""Which plan a CUDA graph of vLLM reads.

vLLM plans on the host before every replay and throws the returned metadata away: a graph reads the
slots that it was captured with. So the choice of a planner must come out the same at capture and at
each replay, from what ``build`` is told at both: the mode of the engine and the longest query.

Mixed mode FULL: one graph of n tokens replays every batch of up to n tokens, whatever they are. It
is captured with a dummy batch that may look like a decode batch (n requests of one token) and then
replays a prefill of n tokens. Only the general plan fits both.

All other modes: only uniform decode batches run in full graphs. The dispatcher compares the query
length of a batch with that of the capture (0.25.1), or bounds both by 1 + drafted tokens (0.33), so
both fall on the same side of that bound. Batches outside full graphs may take either plan.

Source, vLLM 0.25.1: v1/worker/gpu/cudagraph_utils.py _init_candidates and _is_compatible (model
runner V2), v1/cudagraph_dispatcher.py dispatch and v1/worker/gpu_model_runner.py _is_uniform_decode
(V1).
"""

from __future__ import annotations

from vllm.config import CUDAGraphMode


def takes_decode_plan(mode: CUDAGraphMode | None, max_query_len: int, longest: int) -> bool:
    """Return whether a step is planned for the kernel that holds decode tiles only.

    Args:
        mode: of the engine, as its backends allow it.
        max_query_len: query tokens of the step's longest request, or a bound of them.
        longest: query tokens of a request that the decode plan serves: 1 + drafted tokens.
    """
    if mode is not None and mode.mixed_mode() is CUDAGraphMode.FULL:
        return False
    return max_query_len <= longest
