"""The planners of a model runner, and the slot of each layer in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from fi_backend import (
    AttentionConfig,
    Capacity,
    LayerClass,
    PagedBatch,
    PlanSlot,
    StepPlanner,
    Workspace,
    why_not,
    workspace_size,
)

from ..common.sharing import shares_prefixes
from . import support
from .layers import ServedLayer, distinct
from .limits import StepLimits
from .sharing import shared_reads


@dataclass(frozen=True)
class Plan:
    """A planner, and which of its slots each layer runs with.

    Attributes:
        planner: of one kind of steps.
        slots: by SGLang's layer.
    """

    planner: StepPlanner
    slots: dict[Any, PlanSlot]


@dataclass(frozen=True)
class Step:
    """A planned step.

    Attributes:
        plan: that it was planned with.
        batches: one per page table id.
        seq_lens: int64 [requests], as SGLang gave them.
        window_slots: int64 [tokens or more], where K and V go in the pool of window layers.
        params: of the variants, the same for all layers.
    """

    plan: Plan
    batches: list[PagedBatch]
    seq_lens: Tensor
    window_slots: Tensor | None
    params: dict[str, Tensor]


@dataclass(frozen=True)
class StepPlans:
    """The plans of a model runner. They share one workspace: steps follow each other on one stream.

    Attributes:
        general: any step.
        decode: steps in which every request has one query token; on a GPU their kernel holds
            nothing else. All captured batch sizes use this one.
        verify: steps that verify drafted tokens; None without speculation.
    """

    general: Plan
    decode: Plan
    verify: Plan | None

    @classmethod
    def of(
        cls,
        layers: Sequence[ServedLayer],
        limits: StepLimits,
        device: torch.device,
        page_size: int,
        *,
        has_trees: bool,
        writes: bool,
    ) -> StepPlans:
        """Make the planners, and compile what they need on a GPU.

        Args:
            layers: of the model.
            limits: without sharing.
            device: of the model.
            page_size: tokens of a page.
            has_trees: drafted tokens see those that a mask shows, not all before them.
            writes: whether this process writes lines about sharing.

        Raises:
            Unsupported: a layer that is not served; the message lists all reasons.
        """
        classes = list(distinct(layer.layer_class for layer in layers))
        configs = (AttentionConfig.of(one, device) for one in classes)
        support.refuse([reason for config in configs for reason in why_not(config)])
        if shares_prefixes(classes, chunk=0):
            limits = limits.with_sharing()

        def verify_class(layer: ServedLayer) -> LayerClass:
            return layer.tree_class if has_trees else layer.layer_class

        verifying = list(distinct(verify_class(layer) for layer in layers))
        kinds = [(classes, limits.general), (classes, limits.decode)]
        if limits.verify is not None:
            kinds.append((verifying, limits.verify))
        workspace = Workspace.allocate(
            reduce(or_, (workspace_size(one, capacity, device) for one, capacity in kinds)), device
        )

        def make(capacity: Capacity, class_of: Callable[[ServedLayer], LayerClass]) -> Plan:
            index = distinct(class_of(layer) for layer in layers)
            planner = StepPlanner(
                list(index), capacity, device, workspace=workspace, page_size=page_size
            )
            shared_reads.watch(planner, writes=writes)
            slots = {one.layer: planner.slot(index[class_of(one)]) for one in layers}
            return Plan(planner, slots)

        general = make(limits.general, lambda layer: layer.layer_class)
        is_gpu = device.type == "cuda"
        decode = make(limits.decode, lambda layer: layer.layer_class) if is_gpu else general
        verify = None
        if limits.verify is not None:
            verify = make(limits.verify, verify_class)
        return cls(general, decode, verify)
