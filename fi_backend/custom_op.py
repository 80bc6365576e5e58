"""Registering an operator with torch: schema, implementations, and shapes for tracing.

``torch.library.custom_op`` would do the same in one call, at several times the cost per launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# Lives as long as the process: dropping it would unregister the operators.
_LIBRARY = torch.library.Library("fi_backend", "FRAGMENT")  # type: ignore[no-untyped-call]


def register_op(
    schema: str,
    run_on_cpu: Callable[..., object],
    fake: Callable[..., object],
    run_on_cuda: Callable[..., object] | None = None,
) -> None:
    """Register ``torch.ops.fi_backend.<name>``.

    Args:
        schema: ``name(arguments) -> results``; mutated tensors are marked ``Tensor(a!)``.
        run_on_cpu: implementation for CPU tensors.
        fake: returns tensors shaped as the results, without data.
        run_on_cuda: implementation for CUDA tensors, on the current stream of their device; None:
            torch says that there is none.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, run_on_cpu, "CPU")  # type: ignore[no-untyped-call]
    if run_on_cuda is not None:
        _LIBRARY.impl(name, run_on_cuda, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fi_backend::{name}", fake, lib=_LIBRARY)
