"""The one rule for every numerical test, as an assertion. `fastattn prove` judges by it, too."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.measuring.tolerance import TINY, judge

__all__ = ["TINY", "assert_as_exact_as_eager"]


def assert_as_exact_as_eager(actual: Tensor, exact: Tensor, eager: Tensor, **rule: Any) -> None:
    """Raise AssertionError unless the rule is kept. rule: see `fastattn.measuring.tolerance.judge`."""
    wrong = judge(actual, exact, eager, **rule).wrong
    assert not wrong, wrong
