"""`fastattn doctor`: what is installed, which backend computes each feature and why, and whether it computes
right.

Plain text without extras: the report to paste into an issue when something is wrong.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor

from fastattn import __version__
from fastattn.core import backends, capabilities, plans, proofs
from fastattn.core.attention import functional as attention_functional
from fastattn.core.attention import torch_routes
from fastattn.core.capabilities import EVERY_DIRECTION, FEATURES, Feature
from fastattn.core.heads.functional import prepare_heads
from fastattn.core.mlp import functional as mlp_functional
from fastattn.core.norm.functional import layer_norm, rms_norm
from fastattn.measuring import mlp_plan, tables
from fastattn.measuring.tables import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Without one of these flags the report covers everything."""
    parser.add_argument("--features", action="store_true", help="print the page FEATURES.md and nothing else")
    mlp_plan.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Print the report; 1 if the self-test fails, else 0."""
    if options.features:
        print(capabilities.markdown(), end="")
        return 0
    if options.mlp:
        return mlp_plan.run(options)
    print_table("versions", versions())
    print_table("devices", [(str(device), describe(device)) for device in devices()])
    for device in devices():
        print_table(f"features on {device}\n  {default_reason(device)}", feature_rows(device))
        report_routes(device)
        report_proofs(device)
    result = report_self_test()
    print_table("\nplans: calls that the self-test repeated, and that were not checked again", plan_rows())
    return result


# ---- what is here ----


def versions() -> list[tuple[str, ...]]:
    needed_by = {"triton": "", "rich": "demo", "matplotlib": "demo", "transformers": "Hugging Face models"}
    rows = [("fastattn", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    return rows + [(name, _version(name), f"for {use}" if use else "") for name, use in needed_by.items()]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def describe(device: torch.device) -> str:
    if device.type == "cpu":
        without = "" if torch.cuda.is_available() else f"; {_why_no_gpu()}"
        threads = torch.get_num_threads()
        return f"{platform.machine()}, {threads} thread{'s' * (threads != 1)}{without}"
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {capabilities.architecture(device.index)}, {found.total_memory / 2**30:.0f} GiB"


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "no GPU, as this PyTorch is built for CPUs only"
    return "no GPU that PyTorch can use"


# ---- who serves what ----


def default_reason(device: torch.device) -> str:
    """The backend on this device for calls that name none, and why."""
    asked = os.environ.get("FASTATTN_BACKEND")
    if asked:
        return f"FASTATTN_BACKEND asks for {asked}"
    obstacle = capabilities.triton_obstacle(device)
    if obstacle:
        return f"portable is the default; {obstacle}"
    record = proofs.record_of(device)
    if record is not None:
        return f"the Triton kernels serve where they are proven (record of {record.date}), else portable"
    if device.type == "cpu":
        return "portable is the default; the Triton kernels are interpreted here, slowly, on request"
    off = f" ({proofs.VARIABLE}=off)" if proofs.switched_off() else "; `fastattn prove` tests and times them here"
    return f"portable is the default; the Triton kernels are not proven here{off}"


def report_routes(device: torch.device) -> None:
    """Which of PyTorch's kernels serve attention on an NVIDIA GPU where portable serves."""
    if device.type == "cuda" and torch.version.cuda is not None:
        title = f"attention by portable on {device}: PyTorch's kernels, if they pass a trial (see --features)"
        print_table(title, torch_routes.served(torch.cuda.get_device_capability(device)))


def report_proofs(device: torch.device) -> None:
    """The record as a table, and a sentence about each that does not count."""
    if capabilities.triton_obstacle(device) is None:
        record = proofs.record_of(device)
        if record is not None:
            made = f"{record.date}, driver {record.driver or 'unknown'}"
            title = f"proofs on {device}, {made}: times as fast as what would serve otherwise"
            print_table(title, tables.record_rows(record))
            if chosen := tables.tiling_rows(record):
                print_table(tables.CHOSEN, chosen)
        for sentence in proofs.ignored(device):
            print(f"  {sentence}\n")


def feature_rows(device: torch.device) -> list[tuple[str, ...]]:
    """A row for each feature: family, name, the backend, the reason, and other backends that can be named."""
    rows: list[tuple[str, ...]] = [("", "", "served by", "because", "on request")]
    for feature in FEATURES:
        serving, reason = served_by(feature, device)
        others = [n for n in backends.NAMES if n not in serving.split(", ") and _lack(feature, n, device) is None]
        rows.append((feature.family, feature.name, serving, reason, ", ".join(others)))
    return rows


def served_by(feature: Feature, device: torch.device) -> tuple[str, str]:
    """The backend that computes the feature ("nothing" if the requested one cannot), and the reason."""
    asked = os.environ.get("FASTATTN_BACKEND")
    if asked:
        lack = _lack(feature, asked, device)
        return (asked, "asked for") if lack is None else ("nothing", lack)
    record = None if capabilities.triton_obstacle(device) else proofs.record_of(device)
    if record is None and capabilities.default_backend(device) == "portable":
        return "portable", "default"
    lack = _lack(feature, "triton", device)
    if lack is not None or not feature.proof:
        return "portable" if lack else "triton, portable", lack or "by what else is in the call"
    rows = [] if record is None else [r for r in record.rows.values() if _is_about(r.key, feature)]
    if not rows:
        return "portable", "not proven here"
    proven = [row.verdict == proofs.PROVEN for row in rows]
    serving = "triton" if all(proven) else "triton, portable" if any(proven) else "portable"
    return serving, tables.summary(rows)


def _is_about(key: proofs.Key, feature: Feature) -> bool:
    return (key.family, key.kind) == (feature.family, feature.proof)


def _lack(feature: Feature, backend: str, device: torch.device) -> str | None:
    """Why the backend does not compute the feature there; None if it does, in every direction."""
    if backend not in backends.NAMES:
        return f"there is no backend {backend}"
    if backend == "triton" and capabilities.triton_obstacle(device):
        return "triton cannot run here"
    absent = EVERY_DIRECTION - getattr(feature, backend)
    if absent == EVERY_DIRECTION:
        return f"{backend} lacks it"
    return f"{backend} lacks its {' and '.join(sorted(absent))}" if absent else None


def plan_rows() -> list[tuple[str, ...]]:
    """A row for each function: its cached plans, and the calls that found one and that had to make one."""
    rows: list[tuple[str, ...]] = [("", "plans", "found", "made")]
    return rows + [(p.name, str(len(p)), str(p.hits), str(p.misses)) for p in plans.EVERY]


# ---- the self-test ----


@dataclass(frozen=True)
class Case:
    """A public function, and the shapes of its inputs."""

    name: str
    call: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


def _attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    # Both results in one, so that both gradients are tested.
    out, lse = attention_functional.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    return torch.cat([out, lse[..., None].to(out.dtype)], -1)


def _mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, backend: str) -> Tensor:
    return mlp_functional.mlp(x, w1, b1, w2, b2, activation="gelu", backend=backend)


def _gated_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, backend: str) -> Tensor:
    return mlp_functional.gated_mlp(x, w_gate, w_up, w_down, activation="silu", backend=backend)


def _prepare_heads(x: Tensor, weight: Tensor, scale: Tensor, backend: str) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), torch.logspace(0, -2, 16, dtype=x.dtype))
    cos, sin = angles.cos().to(x.device), angles.sin().to(x.device)
    return prepare_heads(x, norm_weight=weight, cos=cos, sin=sin, head_scale=scale, backend=backend)


def _layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return torch.cat(layer_norm(x, weight, bias, residual=residual, backend=backend))


def _rms_norm(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    return rms_norm(x, weight, eps=1e-6, weight_offset=1.0, backend=backend)


CASES = (
    Case("attention, causal, grouped heads", _attention, ((1, 4, 37, 40), (1, 2, 70, 40), (1, 2, 70, 24))),
    Case("heads, norm, rotary, scale", _prepare_heads, ((2, 4, 37, 40), (40,), (4,))),
    Case("mlp, gelu", _mlp, ((2, 17, 24), (40, 24), (40,), (24, 40), (24,))),
    Case("gated mlp, silu", _gated_mlp, ((2, 17, 24), (40, 24), (40, 24), (24, 40))),
    Case("layer norm, residual", _layer_norm, ((2, 17, 40), (2, 17, 40), (40,), (40,))),
    Case("rms norm, weight less one", _rms_norm, ((2, 17, 40), (40,))),
)


def report_self_test() -> int:
    start = time.perf_counter()
    rows: list[tuple[str, ...]] = [("", "", "error", "eager's", "")]
    failures = 0
    for device in devices():
        for backend in ("triton", "portable"):
            if backend == "triton" and capabilities.triton_obstacle(device):
                continue
            for case in CASES:
                row, passed = _tested(case, device, backend)
                rows.append(row)
                failures += not passed
    print_table("self-test, forward and backward in float32 against the definition in float64", rows)
    print(f"{time.perf_counter() - start:.1f} s")
    if failures:
        print(f"fastattn doctor: {failures} of {len(rows) - 1} self-tests failed", file=sys.stderr)
    return 1 if failures else 0


def _tested(case: Case, device: torch.device, backend: str) -> tuple[tuple[str, ...], bool]:
    where = f"{backend} on {device}"
    try:
        error, eager = errors(case, device, backend)
    except Exception as problem:  # any error here is what the report should show
        first_line = (str(problem).splitlines() or [""])[0]
        return (case.name, where, "", "", f"FAILED: {type(problem).__name__}: {first_line}"), False
    # Twice eager's error, plus a unit in the last place, because eager may be exact by luck.
    passed = error <= 2 * eager + torch.finfo(torch.float32).eps
    return (case.name, where, f"{error:.1e}", f"{eager:.1e}", "ok" if passed else "FAILED"), passed


def errors(case: Case, device: torch.device, backend: str) -> tuple[float, float]:
    """The largest error of the backend and of the eager computation, over the output and all gradients.

    Each tensor's error is relative to its largest value.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(device) * shape[-1] ** -0.25 for shape in case.shapes]
    exact = _results(case, [t.double() for t in inputs], "reference")
    if not torch.equal(_results(case, inputs, backend)[0], _results(case, inputs, backend)[0]):
        raise ArithmeticError("a second call, by the plan of the first one, gives another result")
    return tuple(  # type: ignore[return-value]
        max(_distance(ours, truth) for ours, truth in zip(_results(case, inputs, name), exact, strict=True))
        for name in (backend, "reference")
    )


def _results(case: Case, inputs: list[Tensor], backend: str) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = case.call(*leaves, backend=backend)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def _distance(actual: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite for NaN."""
    distance = ((actual.double() - exact).abs().max() / exact.abs().max()).item()
    return distance if distance == distance else float("inf")
