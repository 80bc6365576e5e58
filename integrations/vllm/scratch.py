"""Scratch memory of a GPU: one workspace for all layers of an engine and both kinds of planners.

Layers run one after another on one stream, so they may share it. It is taken while the model is
built, where vLLM's memory profiling sees it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from vllm import envs

from fi_backend import LayerClass, Workspace, WorkspaceSize, workspace_size

from .limits import StepLimits

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# When vLLM asks for batch invariance, KV is cut at fixed positions, however short a step is: at few
# of them, as every query token may need a partial state for each cut, and not closer than a few
# tiles. So one long request still spreads over threads or CTAs.
INVARIANT_CUTS = 16
LEAST_INVARIANT_CHUNK = 512


def invariant_chunk(max_kv_len: int) -> int:
    """Return the KV tokens between cuts of batch-invariant mode; 0 when vLLM does not ask for it.

    Args:
        max_kv_len: of the engine: what its answers are made of stays the same while it does.
    """
    if not envs.VLLM_BATCH_INVARIANT:
        return 0
    share = -(-max_kv_len // INVARIANT_CUTS)
    return max(LEAST_INVARIANT_CHUNK, 1 << (share - 1).bit_length())


class DeviceScratch:
    """The workspace of one device, large enough for everything that was reserved.

    Attributes:
        device: where it lies.
        workspace: what planners share. Another one after a reservation that it could not hold:
            planners keep the one that they were given.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.workspace = Workspace.allocate(WorkspaceSize(0, 0, 0), device)

    def reserve(self, size: WorkspaceSize) -> None:
        """Make the workspace hold this much, and all that was reserved before."""
        held = self.workspace.size
        if held | size != held:
            # The old one goes first: layers reserve before any planner uses it.
            self.workspace = Workspace.allocate(WorkspaceSize(0, 0, 0), self.device)
            self.workspace = Workspace.allocate(held | size, self.device)


# Held by the layers of an engine: freed with them.
_by_device: weakref.WeakValueDictionary[torch.device, DeviceScratch] = weakref.WeakValueDictionary()


def reserve_scratch(
    device: torch.device, layer_classes: Sequence[LayerClass], limits: StepLimits
) -> DeviceScratch:
    """Return the device's scratch memory after making it large enough.

    Args:
        device: a GPU, with its index.
        layer_classes: layers that will use it.
        limits: their largest steps.
    """
    scratch = _by_device.get(device)
    if scratch is None:
        scratch = _by_device[device] = DeviceScratch(device)
    chunk = invariant_chunk(limits.general.max_kv_len)
    general, decode = (
        workspace_size(layer_classes, capacity, device, batch_invariant_chunk=chunk)
        for capacity in (limits.general, limits.decode)
    )
    scratch.reserve(general | decode)
    return scratch


def shared_workspace(
    device: torch.device,
    vllm_config: VllmConfig,
    layer_classes: Sequence[LayerClass],
    limits: StepLimits,
) -> Workspace | None:
    """Return the workspace that a planner of these layers shares with others.

    None, for one of its own, on the CPU, where each planner's is small, and where vLLM overlaps
    micro-batches on two streams, which plan with builders of their own.
    """
    if device.type != "cuda" or vllm_config.parallel_config.use_ubatching:
        return None
    return reserve_scratch(device, layer_classes, limits).workspace
