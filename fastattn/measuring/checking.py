"""One call of any family against float64, forward and backward, by the tests' own rule of tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.measuring import kinds, tolerance
from fastattn.measuring.kinds import Sizes
from fastattn.measuring.tolerance import TINY

# An MLP that keeps 8 bits a number: the error of its gradients as a part of their largest element. The relative
# error of their norm is 0.007.
INT8_ERROR = 0.02


def check_kernel(sizes: Sizes, device: torch.device, notify: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each result and each gradient. Later runs must give the same bits: the second one goes by the plan
    of the first, the third repeats the launches that the second recorded.

    notify: is told "ours" before our kernels run, and "gradients" before those of the backward.
    """
    call = kinds.build(sizes, device)
    dtype = getattr(torch, sizes.dtype)
    notify("ours")
    ours = results_and_gradients(call, "triton", call.tensors, sizes, notify)
    differ: set[str] = set()
    for _ in range(2):
        notify("ours")
        again = results_and_gradients(call, "triton", call.tensors, sizes, notify)
        differ |= {name for name, t in ours.items() if not torch.equal(t, again[name])}
        del again
    notify("eager")
    eager = results_and_gradients(call, "reference", call.tensors, sizes)
    notify("float64")
    exact = results_and_gradients(call, "reference", tuple(t.double() for t in call.tensors), sizes)
    # The backward computes delta = rowsum(dout * out) from the rounded out. Gradients that are sums over rows
    # contain that rounding, and the eager computation does not: they are allowed it on top.
    rounding = torch.finfo(dtype).eps * float(exact["result 0"].norm())
    rows = []
    for name, theirs in exact.items():
        shared = name[1:] in kinds.LEARNED
        allowed = {"dtype": dtype, "tiny": TINY + rounding} if shared else {}
        if "int8" in sizes.kind.split() and name.startswith("d"):
            allowed = {"tiny": TINY + INT8_ERROR * float(theirs.abs().max())}
        rows.append(judge(name, ours[name], theirs, eager[name].to(ours[name].dtype), **allowed))
        if name in differ and rows[-1]["verdict"] == "passed":
            rows[-1]["verdict"] = "FAILED: another run gave other bits"
    return rows


def results_and_gradients(
    call: kinds.Call,
    backend: str,
    tensors: tuple[Tensor, ...],
    sizes: Sizes,
    notify: Callable[[str], None] = lambda step: None,
) -> dict[str, Tensor]:
    """By name: "result 0" and on, then "dq" and so on. The upstream gradients are the same in every dtype."""
    leaves = [t.detach().requires_grad_(sizes.has_gradient) for t in tensors]
    results = call.function(backend, *leaves)
    results = results if isinstance(results, tuple) else (results,)
    found = {f"result {n}": t.detach() for n, t in enumerate(results)}
    if not sizes.has_gradient:
        return found
    torch.manual_seed(1)
    upstream = torch.randn(results[0].shape, device=results[0].device).to(getattr(torch, sizes.dtype))
    flowing = [(results[0], upstream.to(results[0].dtype))]
    flowing += [(result, torch.ones_like(result)) for result in results[1 : call.flowing]]
    outputs, gradients = zip(*flowing, strict=True)
    names = [f"d{name}" for name in call.names]
    notify("gradients")
    return found | dict(zip(names, torch.autograd.grad(outputs, leaves, gradients), strict=True))


def judge(name: str, ours: Tensor, exact: Tensor, eager: Tensor, **allowed: Any) -> dict[str, Any]:
    """Errors of ours and of eager, on the maximum and on the mean, and whether the tests' rule is kept."""
    judged = tolerance.judge(ours, exact, eager, gradient=name.startswith("d"), **allowed)
    finite = ~torch.isinf(exact)
    ours_error, eager_error = ((t.double() - exact)[finite].abs() for t in (ours, eager))
    return {
        "quantity": name,
        "max_error": float(ours_error.max()),
        "eager_max_error": float(eager_error.max()),
        "mean_error": float(ours_error.mean()),
        "eager_mean_error": float(eager_error.mean()),
        "allowed": judged.allowed,
        "verdict": f"FAILED: {judged.wrong}" if judged.wrong else "passed",
    }
