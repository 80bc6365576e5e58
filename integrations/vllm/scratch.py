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

# KV positions between cuts when vLLM asks for batch invariance: a few tiles, so that one long
# request still spreads over all threads or CTAs.
INVARIANT_CHUNK = 512


def invariant_chunk() -> int:
    """Return where batch-invariant mode cuts KV; 0 when vLLM does not ask for it."""
    return INVARIANT_CHUNK if envs.VLLM_BATCH_INVARIANT else 0


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
    general, decode = (
        workspace_size(layer_classes, capacity, device, batch_invariant_chunk=invariant_chunk())
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
