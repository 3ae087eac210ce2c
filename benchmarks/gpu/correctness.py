"""Ours against float64 at real sizes, forward and backward, by the tests' own rule of tolerance.

At 32k tokens the definition's N x N scores do not fit, so it is evaluated on slices of rows: rows are independent
forward, and dk and dv are sums over rows. The eager computation that sets the allowed error is sliced alike, its
sums over slices kept in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.core.attention import definition as attention_definition
from fastattn.core.attention import functional as attention_functional
from fastattn.core.attention.spec import AttentionSpec
from fastattn.measuring.checking import judge
from fastattn.measuring.peers import MLP_PEERS, MLPProblem

# Scores of a slice; a few temporaries of this size are alive at once.
SLICE_BYTES = 2**29


def check_attention(
    sizes: dict[str, Any], backend: str, device: torch.device, notify: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each of out, lse, dq, dk, dv; `sizes` as plan.attention_check makes them."""
    torch.manual_seed(0)
    dtype = getattr(torch, sizes["dtype"])

    def random(heads: int, length: int) -> Tensor:
        size = (sizes["batch"], length, heads, sizes["width"])
        return torch.randn(size, device=device).to(dtype).transpose(1, 2)

    q, dout = (random(sizes["heads"], sizes["queries"]) for _ in range(2))
    k, v = (random(sizes["key_heads"], sizes["keys"]) for _ in range(2))
    spec = AttentionSpec(sizes["causal"], sizes["width"] ** -0.5)
    notify("ours")
    ours = _ours(q, k, v, dout, spec, backend)
    notify("eager, in slices")
    eager = in_slices(q, k, v, dout, spec)
    notify("float64, in slices")
    exact = in_slices(q.double(), k.double(), v.double(), dout.double(), spec)
    return [
        judge(name, *three)
        for name, *three in zip(("out", "lse", "dq", "dk", "dv"), ours, exact, eager, strict=True)
    ]


def _ours(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, spec: AttentionSpec, backend: str) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = attention_functional.attention(
        *leaves, causal=spec.causal, scale=spec.scale, return_lse=True, backend=backend
    )
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)


def in_slices(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, spec: AttentionSpec) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv of the definition in the dtype of the inputs."""
    queries, keys = q.shape[2], k.shape[2]
    rows = max(1, SLICE_BYTES // (q.shape[0] * q.shape[1] * keys * q.element_size()))
    out, dq = torch.zeros_like(dout), torch.zeros_like(q)
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full(q.shape[:3], float("-inf"), dtype=sums, device=q.device)
    dk, dv = torch.zeros_like(k, dtype=sums), torch.zeros_like(v, dtype=sums)
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        # Causal is aligned bottom-right: without the keys that these rows do not see, the slice is causal too.
        end = max(0, stop + keys - queries) if spec.causal else keys
        if end == 0:
            continue
        part = [t.detach().requires_grad_() for t in (q[:, :, start:stop], k[:, :, :end], v[:, :, :end])]
        out_part, lse_part = attention_definition.attention(*part, spec)
        dq[:, :, start:stop], dk_part, dv_part = torch.autograd.grad(out_part, part, dout[:, :, start:stop])
        out[:, :, start:stop], lse[:, :, start:stop] = out_part.detach(), lse_part.detach()
        dk[:, :, :end] += dk_part
        dv[:, :, :end] += dv_part
    return out, lse, dq, dk.to(k.dtype), dv.to(v.dtype)


def check_mlp(
    problem: MLPProblem, backend: str, device: torch.device, notify: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for y and for the gradient of each input."""
    torch.manual_seed(0)
    inputs = problem.inputs(device)
    dy = torch.randn(inputs[0].shape, device=device).to(inputs[0].dtype)

    def gradients(peer: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        y = MLP_PEERS[peer](problem, device)(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))

    notify("ours")
    ours = gradients(f"fastattn {backend}", dy.dtype)
    notify("eager")
    eager = gradients("eager", dy.dtype)
    notify("float64")
    exact = gradients("eager", torch.float64)
    names = ("y", "dx", "dw_gate", "dw_up", "dw_down") if problem.gated else ("y", "dx", "dw1", "dw2")
    return [judge(name, *three) for name, *three in zip(names, ours, exact, eager, strict=True)]
