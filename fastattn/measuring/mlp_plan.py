"""`fastattn doctor --mlp TOKENS WIDTH HIDDEN`: what an MLP of this size costs here, before anybody trains it.

Which backend serves it, how long its matrix products alone take (no MLP that uses them can be faster), and how
many bytes each `save=` keeps for the backward. Nothing but one product is computed.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core import capabilities
from fastattn.core.capabilities import BACKWARD, FORWARD, Request
from fastattn.core.mlp.spec import ALWAYS, AUTO, NEVER, SAVES, MLPSpec, MLPWeights, automatic_chunk
from fastattn.core.mlp.whole import resolved
from fastattn.measuring.tables import print_table

DTYPES = ("float32", "float16", "bfloat16")
SECONDS = 0.3  # that the product is repeated for

SIZES = ("TOKENS", "WIDTH", "HIDDEN")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two options of `fastattn doctor`."""
    text = "print what serves an MLP of this size, the least time it can take, and what it keeps; nothing else"
    parser.add_argument("--mlp", nargs=3, type=int, metavar=SIZES, help=text)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of that MLP (default: float32)")


def run(options: argparse.Namespace) -> int:
    """Print the report; 2 if a size is no size."""
    for name, size in zip(SIZES, options.mlp, strict=True):
        if size < 1:
            print(f"fastattn doctor: {name} must be at least 1, got {size}")
            return 2
    tokens, width, hidden = options.mlp
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    rate = product_rate(tokens, width, hidden, dtype, device)
    for gated in (False, True):
        title = "gated MLP, silu" if gated else "MLP, gelu"
        print_table(
            f"{title}: {tokens} x {width} -> {hidden} -> {width}, {options.dtype}, on {device}",
            [*served(tokens, width, hidden, dtype, device, gated), *floors(tokens, width, hidden, gated, rate)],
        )
        heading = ("save=", "bytes kept", "a token", "tokens at a time", "hidden-wide tensors in the backward")
        print_table("kept for the backward", [heading, *kept_rows(tokens, width, hidden, dtype, device, gated)])
    print("Bytes kept are those of x and of what is kept beside it. The least time is that of the matrix products")
    print(f"alone, at the {rate / 1e9:.4g} GFLOP/s of a product of this size that was timed just now.")
    return 0


def tensors(tokens: int, width: int, hidden: int, dtype: torch.dtype, gated: bool) -> tuple[Tensor, MLPWeights]:
    """x and the weights, without values."""
    into, out = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((hidden, width), (width, hidden)))
    x = torch.empty(tokens, width, dtype=dtype, device="meta")
    return x, MLPWeights(into, None, into if gated else None, None, out)


def product_rate(tokens: int, width: int, hidden: int, dtype: torch.dtype, device: torch.device) -> float:
    """Flop a second of the first product, the fastest of some; of at most 16384 tokens."""
    x = torch.randn(min(tokens, 16384), width, device=device).to(dtype)
    w = torch.randn(hidden, width, device=device).to(dtype)
    best, until = float("inf"), time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < until:
        start = time.perf_counter()
        F.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * len(x) * width * hidden / best


def served(
    tokens: int, width: int, hidden: int, dtype: torch.dtype, device: torch.device, gated: bool
) -> list[tuple[str, ...]]:
    """Which backend computes each direction, and how; and whether one kernel computes the whole layer."""
    x = torch.empty(tokens, width, dtype=dtype, device=device)
    _, weights = tensors(tokens, width, hidden, dtype, gated)
    spec = resolved(x, weights, MLPSpec("silu" if gated else "gelu", gated, whole=AUTO), None)
    rows: list[tuple[str, ...]] = []
    for direction in (FORWARD, BACKWARD):
        chosen = capabilities.choose(Request("mlp", spec, (x,)), direction)
        rows.append((direction, chosen, path(chosen, x, hidden, spec)))
    return [*rows, ("one kernel for the whole layer", *whole_layer(x, spec))]


def whole_layer(x: Tensor, spec: MLPSpec) -> tuple[str, str]:
    """Whether one kernel computes it, and why."""
    if spec.whole == ALWAYS:
        return "yes", "it is proven to be faster"
    if x.shape[1] > capabilities.WHOLE_WIDTHS[-1]:
        return "no", f"only up to {capabilities.WHOLE_WIDTHS[-1]} wide"
    if x.dtype == torch.float32:
        return "no", "only in half precision"
    return "no", "not proven to be faster at every number of tokens"


def path(backend: str, x: Tensor, hidden: int, spec: MLPSpec) -> str:
    """How this backend computes the first product and the activation, in words."""
    if backend != "triton":
        return "PyTorch's products and activations"
    if spec.whole == ALWAYS:
        return "the hidden layer never leaves the chip"
    from fastattn.kernels.mlp.forward import hidden_kernel
    from fastattn.kernels.mlp.problem import Size
    from fastattn.kernels.mlp.products import is_fused

    weight = x.new_empty(hidden, x.shape[1])
    fused = is_fused(hidden_kernel, Size(x.shape[0], x.shape[1], hidden), (x, weight), None)
    return "the activation in the product's kernel" if fused else "the library's product, then one pass over it"


def floors(tokens: int, width: int, hidden: int, gated: bool, rate: float) -> list[tuple[str, ...]]:
    """The least time of a forward, and of a forward with its backward."""
    rows: list[tuple[str, ...]] = []
    # Imported late: it brings Triton, which other parts of `doctor` may be there to miss.
    from fastattn.measuring.peers import TRAINING, mlp_flops

    for direction, name in ((FORWARD, "forward"), (TRAINING, "forward and backward")):
        flops = mlp_flops(tokens, width, hidden, gated=gated, direction=direction)
        rows.append((f"least time, {name}", f"{1e3 * flops / rate:.4g} ms", f"{flops / 1e9:.4g} GFLOP"))
    return rows


def kept_rows(
    tokens: int, width: int, hidden: int, dtype: torch.dtype, device: torch.device, gated: bool
) -> list[tuple[str, ...]]:
    """For each `save=` what the backend that serves it keeps."""
    x, weights = tensors(tokens, width, hidden, dtype, gated)
    there = torch.empty(tokens, width, dtype=dtype, device=device)
    rows: list[tuple[str, ...]] = []
    for save in SAVES:
        chunk = automatic_chunk(there.is_cuda, hidden, dtype.itemsize, save)
        whole = AUTO if save in ("auto", "nothing") else NEVER
        asked = MLPSpec("silu" if gated else "gelu", gated, save=save, chunk=chunk, whole=whole)
        spec = resolved(there, weights, asked, None)
        kept = capabilities.module(Request("mlp", spec, (there,)), FORWARD).kept_empty(x, weights, spec)
        total = sum(t.numel() * t.element_size() for t in (x, *kept))
        at_a_time = min(chunk or tokens, tokens)
        most = 0 if spec.whole == ALWAYS else 3 * at_a_time * hidden * dtype.itemsize * (2 if gated else 1)
        rows.append((save, _bytes(total), f"{total / tokens:.6g}", f"{at_a_time}", f"at most {_bytes(most)}"))
    return rows


def _bytes(count: int) -> str:
    return f"{count / 2**20:.4g} MiB" if count >= 2**20 else f"{count / 2**10:.4g} KiB"
