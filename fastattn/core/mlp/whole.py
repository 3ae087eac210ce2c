"""Which calls one kernel computes as a whole. It keeps nothing but x, and computes the hidden layer again in the
backward.

Forward and backward are decided together, by the same rule: another kernel may sum the hidden layer in another
order, and the gradients must belong to the hidden layer of the forward. The rule knows widths, strides, dtype and
device, not the number of tokens: a batch gets the same bits as its parts.
"""

from __future__ import annotations

import os
from dataclasses import replace

from torch import Tensor

from fastattn.core import backends, capabilities
from fastattn.core.capabilities import FORWARD, Request
from fastattn.core.mlp.spec import ALWAYS, AUTO, NEVER, MLPSpec, MLPWeights


def resolved(x: Tensor, weights: MLPWeights, spec: MLPSpec, backend: str | None) -> MLPSpec:
    """The spec with `whole` decided.

    ALWAYS stays if the kernel can compute the call. AUTO becomes ALWAYS where a proof record says that the kernel
    is faster; if the caller asks for the Triton backend by name, where it is faster by counting.
    """
    if spec.whole == NEVER:
        return spec
    asked = backend or os.environ.get("FASTATTN_BACKEND") or None
    whole = replace(spec, whole=ALWAYS)
    if asked not in (None, "triton") or not _serves(x, weights, whole, asked is None, spec.whole == AUTO):
        return replace(spec, whole=NEVER)
    return whole


def _serves(x: Tensor, weights: MLPWeights, whole: MLPSpec, by_record: bool, by_count: bool) -> bool:
    request = Request("mlp", whole, (x,))
    if by_record and not _is_proven(request, weights.w_out.shape[0]):
        return False
    if capabilities.missing(request, FORWARD, "triton"):
        return False
    kernels = backends.load("mlp", "triton")
    if not kernels.computes_whole(x, weights, whole):
        return False
    return by_record or not by_count or kernels.gains_whole(x, weights, whole)


def _is_proven(request: Request, out: int) -> bool:
    """Proofs name the width of x; where the output is wider, they are about other tiles."""
    is_wider = out > capabilities.question(request, FORWARD).width
    return not is_wider and capabilities.proven_at_every_size(request)
