"""Where attention's results come from, token by token, in O(L) memory: its backward with respect to the values.

As out_i = sum_j P_ij v_j, the gradient of out with respect to v, pulled back from g, is sum_i P_ij g_i: a weighted
column sum of the pattern. The backward of whatever attention the model has computes it, with every mask, bias,
soft cap, sink and layout of heads that this attention knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from fastattn.lens.adapters import Adapter
from fastattn.lens.places import Name, change
from fastattn.lens.running import Reached, last_stream


class Watched:
    """One layer's attention with its graph: `heads_out` (B, Hq, L, Dv) from the leaf `values` (B, Hkv, L, Dv)."""

    values: Tensor
    heads_out: Tensor

    def pulled(self, upstream: Tensor) -> Tensor:
        """sum_i P_ij g_i, summed over the query heads of each key head (B, Hkv, L, Dv), for g (B, Hq, L, Dv)."""
        (gradient,) = torch.autograd.grad(self.heads_out, self.values, upstream)
        return gradient


def attention_of_layer(adapter: Adapter, layer: int, tokens: Tensor, options: dict[str, Any]) -> Watched:
    """The attention of one layer with its graph; the model runs up to there."""

    def reach(heads_out: Tensor) -> Tensor:
        raise Reached(heads_out)

    with watched_values(adapter, [layer]) as watched, ExitStack() as stack:
        stack.callback(change(adapter, _name(layer, "z"), reach).remove)
        last_stream(adapter, tokens, options)
    return watched[layer]


@contextmanager
def watched_values(adapter: Adapter, layers: Iterable[int]) -> Iterator[dict[int, Watched]]:
    """Within, these layers' attention keeps a graph from its values to its result, and nothing else does.

    Values are made leaves; gradients are recorded from there until the heads are read.
    """
    watched = {layer: Watched() for layer in layers}

    def begin(layer: int) -> Callable[[Tensor], Tensor]:
        def see(values: Tensor) -> Tensor:
            torch.set_grad_enabled(True)
            watched[layer].values = values.detach().requires_grad_()
            return watched[layer].values

        return see

    def end(layer: int) -> Callable[[Tensor], Tensor]:
        def see(heads_out: Tensor) -> Tensor:
            torch.set_grad_enabled(False)
            watched[layer].heads_out = heads_out
            return heads_out.detach()

        return see

    # An inference tensor cannot be part of a graph.
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        for layer in watched:
            stack.callback(change(adapter, _name(layer, "v"), begin(layer)).remove)
            stack.callback(change(adapter, _name(layer, "z"), end(layer)).remove)
        yield watched


def _name(layer: int, x: str) -> Name:
    return Name(layer, f"attention.hook_{x}")
