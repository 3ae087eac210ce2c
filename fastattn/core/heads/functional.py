"""What happens to heads between projection and attention, as a function of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.core import plans, spread
from fastattn.core.capabilities import check_backend
from fastattn.core.heads.operators import HeadsPlan, PrepareHeads, PrepareHeadsEagerly
from fastattn.core.heads.spec import head_tensors, heads_spec


def prepare_heads(
    x: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm: bool = False,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    offsets: int | Tensor = 0,
    head_scale: Tensor | float | None = None,
    backend: str | None = None,
) -> Tensor:
    """head_scale * rotate(norm(x) * norm_weight): RMS norm of each head, rotary embedding and scale, in one pass.

    A step is left out unless its arguments are given. The backward is one pass, too; only x is kept for it.

    Args:
        x: queries or keys (B, H, L, D); any strides.
        norm_weight: (D,) or (H, D); turns the norm on. With gradient.
        norm: divide every row by sqrt(its mean square + eps), also without a weight.
        eps: at least 1.2e-38.
        cos, sin: the rotation, in any floating dtype, without gradient. Either (positions, W/2), a row for each
            position, or (B, L, W/2), a row for each row of x. The first W components of a head form W/2 pairs; a
            pair (a, b) becomes (a cos - b sin, b cos + a sin). The other components stay.
        interleaved: component 2i is paired with 2i + 1 (RoFormer, GPT-J); else i with i + W/2 (GPT-NeoX, Llama).
        offsets: the position of row 0: a number, or integers (B,), such as the lengths of a cache. In a tensor,
            negative positions (left padding) count as 0. Positions beyond the table are an error where they can
            be read beforehand; otherwise (GPU, tracing) their rows are NaN.
        head_scale: a number, or (H,) or (B, H). With gradient.
        backend: as `attention`'s.

    Returns:
        (B, H, L, D) in x's dtype, laid out (B, L, H, D) in memory; computed in fp32 (fp64 for fp64 x), rounded
        once.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected, before anything runs.

    Example:
        >>> q, weight = torch.randn(1, 8, 16, 64), torch.ones(64)
        >>> angles = torch.outer(torch.arange(16.0), 10_000 ** (-torch.arange(32) / 32))
        >>> prepare_heads(q, norm_weight=weight, cos=angles.cos(), sin=angles.sin()).shape
        torch.Size([1, 8, 16, 64])

    Source: rotary: Su et al., RoFormer (2021), section 3.4.2; RMS norm: Zhang and Sennrich (2019), equation 4, of
    queries and keys as in Dehghani et al., Scaling Vision Transformers to 22 Billion Parameters (2023), section 2.
    """
    starts, scales = (t if isinstance(t, Tensor) else None for t in (offsets, head_scale))
    key = plans.key(
        (x, norm_weight, cos, sin, starts, scales),
        # Offsets that are a tensor have no place in a key: their values are checked in every call.
        (offsets, None if scales is head_scale else head_scale, norm, eps, interleaved, backend),
    )
    plan = PLANS.find(key)
    if plan is not None:
        return plans.run(plan, x, *head_tensors(x, norm_weight, cos, sin, offsets, head_scale))[0]
    if spread.is_dtensor(x):
        return spread.of_dtensors["prepare_heads"](x, {
            "norm_weight": norm_weight, "norm": norm, "eps": eps, "cos": cos, "sin": sin,
            "interleaved": interleaved, "offsets": offsets, "head_scale": head_scale, "backend": backend,
        })  # fmt: skip
    spec, beside = heads_spec(
        x, norm_weight=norm_weight, norm=norm, eps=eps, cos=cos, sin=sin, interleaved=interleaved,
        offsets=offsets, head_scale=head_scale,
    )  # fmt: skip
    backend = check_backend(backend)
    if key is not None:
        plan = HeadsPlan.of(x, beside, spec, backend)
        PLANS.keep(key, plan)
        return plans.run(plan, x, *beside)[0]
    function = PrepareHeads if torch.compiler.is_compiling() else PrepareHeadsEagerly
    return function.apply(x, *beside, *spec.options, backend)


PLANS: plans.Plans[HeadsPlan] = plans.Plans("prepare_heads")
