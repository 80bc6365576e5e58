"""The committed results: malformed ones fail, stale ones are reported."""

from __future__ import annotations

import warnings

from e2e_bench import evidence


class StaleEvidence(UserWarning):
    """Results that were measured on other sources than these."""


def test_committed_results_are_well_formed_and_stale_ones_are_named() -> None:
    found = evidence.gather()
    assert found, "no results are committed"
    for one in found:
        if one.stale:
            warnings.warn(one.line(), StaleEvidence, stacklevel=1)
