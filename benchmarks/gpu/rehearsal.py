"""--dry-run: everything planned is launched on a pretended H100, forward and backward; nothing is computed.

Triton's compiler, binder and launcher are the real ones (see tests/pretended_gpu), so a launch that a GPU would
refuse fails here. What PyTorch would compute around the kernels is left out where it is large.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.gpu import sweep
from fastattn.core import plans
from fastattn.core.attention.tilings import tiling_of, trying
from fastattn.measuring import kinds, measure, prove_tilings, prove_worker
from fastattn.measuring.kinds import Sizes
from fastattn.measuring.paths import ROOT
from fastattn.measuring.peers import BACKWARD, FORWARD, TRAINING, problem_from

GPU = "H100"
OURS = "fastattn triton"
LARGE = 2**18  # elements
UNTIL = "FASTATTN_REHEARSE_UNTIL"  # in a process's environment: the last stage of the compiler, by default ptx


def obstacle() -> str | None:
    """Why nothing can be rehearsed here; None if it can."""
    if not (ROOT / "tests" / "pretended_gpu").is_dir():
        return "this checkout has no tests/pretended_gpu"
    from tests import pretended_gpu

    return pretended_gpu.obstacle()


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    from tests.pretended_gpu import GPUS, pretended_gpus
    from tests.pretended_gpu.tensors import planned

    with LeaveOut(), pretended_gpus(GPUS[GPU], until=os.environ.get(UNTIL, "ptx")), planned(modes=2):
        yield


class LeaveOut(TorchDispatchMode):
    """While it is active, large floating-point results are allocated but not computed: their values mean
    nothing."""

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if operator.namespace == "aten":
            aliases = [r.alias_info for r in operator._schema.returns]
            if any(a is not None and a.is_write for a in aliases) and _is_large(arguments[0]):
                return arguments[0]
            if not any(aliases):
                with contextlib.suppress(NotImplementedError, RuntimeError, TypeError):
                    shapes = operator(*_on_meta(arguments), **{**_on_meta(keywords), **_device_of(keywords)})
                    if all(map(_is_large, tree_leaves(shapes))):
                        return tree_map_only(Tensor, lambda t: torch.empty_like(t, device="cpu"), shapes)
        return operator(*arguments, **keywords)


def _is_large(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > LARGE


def _on_meta(values: Any) -> Any:
    def shape_of(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    return tree_map_only(Tensor, shape_of, values)


def _device_of(keywords: dict[str, Any]) -> dict[str, Any]:
    return {"device": torch.device("meta")} if keywords.get("device") is not None else {}


# ---- the cases ----


def launch(case: dict[str, Any], device: torch.device, notify: Callable[[str], None]) -> list[dict[str, Any]]:
    """Launch our kernels of the case `of`; raises where a GPU would refuse."""
    inner = case["of"]
    notify(OURS)
    for step in LAUNCHERS[inner["kind"]](inner, device):
        step()
    return [{"launched": True}]


Steps = Iterator[Callable[[], Any]]


def _call(case: dict[str, Any], device: torch.device) -> Steps:
    """A call of kinds: forward, and the gradients of everything."""
    sizes = Sizes(**case["sizes"])
    call = kinds.build(sizes, device)
    leaves = [t.detach().requires_grad_() for t in call.tensors]
    if not sizes.has_gradient:
        yield functools.partial(call.function, "triton", *call.tensors)
        return
    with torch.no_grad():
        yield functools.partial(call.function, "triton", *call.tensors)
    result = call.function("triton", *leaves)
    out = result[0] if isinstance(result, tuple) else result
    yield functools.partial(torch.autograd.grad, out, leaves, torch.empty_like(out))


def _problem(case: dict[str, Any], device: torch.device) -> Steps:
    """A call of fastattn.measuring.peers."""
    problem = problem_from(case["problem"])
    inputs = problem.inputs(device)
    for direction in (FORWARD, BACKWARD if problem.family == "attention" else TRAINING):
        yield measure.prepare(problem, direction, OURS, inputs)[0]


def _check_attention(case: dict[str, Any], device: torch.device) -> Steps:
    s = case["sizes"]
    return _call(
        {"sizes": {
            "family": "attention", "kind": "causal" if s["causal"] else "full", "dtype": s["dtype"],
            "batch": s["batch"], "heads": s["heads"], "key_heads": s["key_heads"], "length": s["queries"],
            "keys": s["keys"], "width": s["width"],
        }}, device,
    )  # fmt: skip


def _tiling(case: dict[str, Any], device: torch.device) -> Steps:
    """A candidate's row, in the direction that uses it. That it does not fit is a result, and no failure."""
    problem = problem_from(case["problem"])
    inputs = problem.inputs(device)
    with sweep.launched_with(case):
        yield measure.prepare(problem, case["direction"], OURS, inputs)[0]


def _checks(case: dict[str, Any], device: torch.device) -> Steps:
    """What `fastattn prove` checks."""
    for sizes in case["checks"]:
        yield from _call({"sizes": sizes}, device)


def _timed(case: dict[str, Any], device: torch.device) -> Steps:
    """What it times, at the smallest size; dispatch must find the row of the record that is proven by it."""
    size, given = next(iter(case["timed"].items()))

    def step(direction: str) -> None:
        plans.forget()
        call = kinds.build(Sizes(**given), device)
        with prove_worker.asked() as questions:
            prove_worker.thunk(call, prove_worker.OURS, direction)()
        prove_worker.must_be_about(case, size, direction, questions)

    for direction in case["directions"]:
        yield functools.partial(step, direction)


def _try(case: dict[str, Any], device: torch.device) -> Steps:
    """What it checks of another tiling than the launch tables'."""
    chosen = case["try"]
    with trying({chosen["table"]: tiling_of(chosen["tiling"])}):
        for sizes in prove_tilings.checks_of(case, device):
            yield from _call({"sizes": sizes.as_json()}, device)


def _nothing(case: dict[str, Any], device: torch.device) -> Steps:
    return iter(())


LAUNCHERS: dict[str, Callable[[dict[str, Any], torch.device], Steps]] = {
    "kernel": _call,
    "feature": _call,
    "small call": _call,
    "peers": _problem,
    "check mlp": _problem,
    "check attention": _check_attention,
    "tiling": _tiling,
    "check": _checks,
    "time": _timed,
    "try": _try,
    "ceilings": _nothing,
}
