"""Where attention's results come from, token by token, in O(L) memory: its backward with respect to the values.

As out_i = sum_j P_ij v_j, the gradient of out with respect to v, pulled back from g, is sum_i P_ij g_i: a weighted
column sum of the pattern. The backward of whatever attention the model has computes it, with every mask, bias,
soft cap, sink and layout of heads that this attention knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastattn.lens.adapters import Adapter
from fastattn.lens.running import Reached, hooks, last_stream


def pulled_to_values(
    adapter: Adapter, layer: int, tokens: Tensor, options: dict[str, Any], upstream: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The values of a layer (B, L, Hkv, Dv) and what is pulled back to them, same shape.

    Args:
        upstream: makes of what attention gives, (B, L, Hq Dv), the gradient to pull back, same shape.
    """

    with watched_values(adapter, [layer]) as watched, hooks() as hooked:
        hooked.on_input(adapter.part("out", layer), _reach)
        last_stream(adapter, tokens, options)
        leaf, heads_out = watched[layer].leaf, watched[layer].heads_out
        (gradient,) = torch.autograd.grad(heads_out, leaf, upstream(heads_out.detach()))
    return values_of(adapter, leaf.detach()), values_of(adapter, gradient)


def _reach(heads_out: Tensor) -> None:
    raise Reached(heads_out)


class Watched:
    """One layer's attention with its graph: `heads_out` (B, L, Hq Dv), from `leaf`, what gives the values."""

    leaf: Tensor
    heads_out: Tensor


@contextmanager
def watched_values(adapter: Adapter, layers: Iterable[int]) -> Iterator[dict[int, Watched]]:
    """Within, these layers' attention keeps a graph from its values to its result, and nothing else does.

    Values are made leaves; gradients are recorded from there up to the layer that joins the heads.
    """
    watched = {layer: Watched() for layer in layers}

    def begin(layer: int) -> Callable[[Tensor], Tensor]:
        def see(made: Tensor) -> Tensor:
            torch.set_grad_enabled(True)
            watched[layer].leaf = made.detach().requires_grad_()
            return watched[layer].leaf

        return see

    def end(layer: int) -> Callable[[Tensor], Tensor]:
        def see(heads_out: Tensor) -> Tensor:
            torch.set_grad_enabled(False)
            watched[layer].heads_out = heads_out
            return heads_out.detach()

        return see

    # An inference tensor cannot be part of a graph.
    with torch.inference_mode(False), torch.no_grad(), hooks() as hooked:
        for layer in watched:
            maker = adapter.part("v", layer)
            hooked.on_output(adapter.part("q", layer) if maker is None else maker, begin(layer))
            hooked.on_input(adapter.part("out", layer), end(layer))
        yield watched


def values_of(adapter: Adapter, made: Tensor) -> Tensor:
    """Values (B, L, Hkv, Dv) as they lie in what their layer gives, which may be queries and keys, too."""
    if adapter.family.v is not None:
        return made.unflatten(-1, (adapter.num_kv_heads, -1))
    heads = made.unflatten(-1, (adapter.num_heads + 2 * adapter.num_kv_heads, -1))
    return heads[..., 2::3, :] if adapter.family.interleaved else heads[..., -adapter.num_kv_heads :, :]
