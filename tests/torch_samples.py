"""PyTorch's own samples: the calls by which it tests its modules and functions, to run ours against theirs."""

from __future__ import annotations

import importlib.util
import sys
import types
import unittest
import warnings
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

if importlib.util.find_spec("expecttest") is None:
    # PyTorch's tables import a test case derived from expecttest's, which none of them is.
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)  # type: ignore[assignment]

# Importing them also freezes global settings and adds filters of warnings, which other tests should not feel.
with mock.patch("torch.backends.disable_global_flags"), warnings.catch_warnings():
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db


def module_samples(cls: type[nn.Module], training: bool) -> list[Any]:
    """The ModuleInputs of a torch.nn class, in float64."""
    (info,) = (info for info in module_db if info.module_cls is cls)
    options = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": training}
    return info.module_inputs_func(info, **options)


def sdpa_samples(dropout: bool) -> list[Any]:
    """The SampleInputs of scaled_dot_product_attention in float64, those with dropout or those without."""
    (op,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    samples = op.sample_inputs("cpu", torch.float64, requires_grad=True)
    return [s for s in samples if bool(s.kwargs["dropout_p"]) == dropout]


def tensors(results: Any) -> list[Tensor]:
    """The tensors among results."""
    return [t for t in (results if isinstance(results, tuple) else (results,)) if isinstance(t, Tensor)]


def leaves(*arguments: Any) -> list[Tensor]:
    """What wants a gradient among arguments."""
    return [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]


def gradients(results: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Of inputs, for a fixed random gradient of each result; zeros where they have no part."""
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]
    found = torch.autograd.grad(results, inputs, upstream, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


def assert_same(ours: Any, theirs: Any, our_inputs: list[Tensor], their_inputs: list[Tensor]) -> None:
    """The same results and the same gradients."""
    ours, theirs = tensors(ours), tensors(theirs)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, our_inputs), gradients(theirs, their_inputs))
