"""Elementwise steps around PyTorch's kernels on a GPU, one launch each: C++ functions that PyTorch's jiterator
compiles.

The jiterator is in beta, so each function is tried first. Where it does not give what PyTorch's operators give, or
fails, they do the work in several launches, and the log says so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ground.modes import capturing, outside_modes

# A gradient of the log-sum-exp is given to a kernel as COARSE * high + low, two numbers in the dtype of the heads:
# that rounds nothing of account, and in float16 passes numbers up to 2**28.
COARSE = 4096.0
HIDDEN = float("-inf")

log = logging.getLogger("fastattn")
_known: dict[tuple[str, torch.device], bool] = {}


class Step(NamedTuple):
    """An elementwise function of float32 numbers; tensors of other dtypes are converted within its launch.

    name: what it computes, in words.
    code: in C++, of a type T. One function, because the jiterator's parser looks for the last one.
    results: how many, each of the shape that the inputs broadcast to.
    plain: the same by operators.
    """

    name: str
    code: str
    results: int
    plain: Callable[..., Sequence[Tensor]]


# ---- sinks ----


def _share_by_operators(lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    # -inf minus -inf, of a row that sees nothing, is NaN.
    return torch.sigmoid(lse - sink).nan_to_num_(0.0), torch.logaddexp(lse, sink)


# The keys keep exp(lse) of exp(lse) + exp(sink). Their share, and the log-sum-exp of both.
SHARE = Step(
    "the share of keys beside a sink",
    """
template <typename T>
void share_of_keys(T lse, T sink, T& share, T& total) {
  T high = lse < sink ? sink : lse, low = lse < sink ? lse : sink;
  share = T(1) / (T(1) + ::exp(sink - lse));
  share = share == share ? share : T(0);
  total = low - high == T(0) || low < high ? high + ::log1p(::exp(low - high)) : high;
}
""",
    2,
    _share_by_operators,
)


def _sink_gradient_by_operators(
    dout: Tensor, out: Tensor, lse: Tensor, sink: Tensor, dlse: Tensor, first: Tensor
) -> tuple[Tensor]:
    weights = torch.exp(sink - lse).nan_to_num_(0.0, 0.0)
    return (weights * (dlse.nan_to_num(0.0) * first - dout.to(lse.dtype) * out),)


# The gradient of a sink is the sum of this over its rows and their width. `first` is 1 for the first number of a
# row, else 0.
SINK_GRADIENT = Step(
    "the gradient of sinks",
    """
template <typename T>
T gradient_of_sink(T dout, T out, T lse, T sink, T dlse, T first) {
  T weight = ::exp(sink - lse), of_lse = first == T(0) ? T(0) : dlse;
  return weight - weight == T(0) ? weight * (of_lse - dout * out) : T(0);
}
""",
    1,
    _sink_gradient_by_operators,
)


# ---- the gradient of the log-sum-exp ----


def _parts_by_operators(out: Tensor, dlse: Tensor, lse: Tensor, minus: Tensor, dtype: torch.dtype) -> list[Tensor]:
    dlse = dlse.masked_fill(lse == HIDDEN, 0.0)
    parts = torch.zeros((*dlse.shape[:-1], minus.shape[-1] * 4 // dtype.itemsize), dtype=dtype, device=dlse.device)
    high = torch.div(dlse[..., 0], COARSE, out=parts[..., 0])
    torch.sub(dlse[..., 0], high, alpha=COARSE, out=parts[..., 1])
    return [parts.view(torch.float32), minus.expand(*dlse.shape[:-1], -1)]


# COARSE * high + low are VALUE: two numbers in half precision, rounded to even, in one of float32. The first lies
# in its lower bits.
_HIGH_AND_LOW = """
  union { float number; unsigned int bits; } rest, part, joined;
  rest.number = VALUE;
  part.number = rest.number / COARSEf;
  joined.bits = 0;
  for (int i = 0; i < 2; ++i) {
    unsigned int sign = part.bits >> 16 & 0x8000u, size = part.bits & 0x7FFFFFFFu, half;
    ROUND
    joined.bits |= (sign | half) << (16 * i);
    rest.number -= COARSEf * part.number;
    part.number = rest.number;
  }
"""
# half: the bits of the rounded size. part: the rounded number. Below 2**-14 float16 has steps of 2**-24, as a
# number of float32 that 1/2 is added to.
_ROUND = {
    torch.float16: """
    union { float number; unsigned int bits; } moved;
    moved.bits = size;
    if (size > 0x7F800000u) half = 0x7E00u;
    else if (size >= 0x477FF000u) half = 0x7C00u;
    else if (size < 0x38800000u) { moved.number += 0.5f; half = moved.bits - 0x3F000000u; }
    else half = (size + 0xFFFu + (size >> 13 & 1u) - 0x38000000u) >> 13;
    moved.bits = half < 0x7C00u ? (half << 13) + 0x38000000u : half << 13 | 0x7F800000u;
    if (half < 0x400u) moved.number = (float)half / 16777216.0f;
    moved.bits |= sign << 16;
    part.number = moved.number;
""",
    torch.bfloat16: """
    half = size > 0x7F800000u ? 0x7FC0u : (size + 0x7FFFu + (size >> 16 & 1u)) >> 16;
    part.bits = (sign | half) << 16;
""",
}
_PARTS = """
template <typename T>
void parts_of_gradient(T out, T dlse, T lse, T minus, T& parts, T& dout) {
  HIGH_AND_LOW
  parts = joined.number;
  dout = minus;
}
"""
_WHOLE = """
template <typename T>
void parts_of_gradient(T out, T dlse, T lse, T minus, T& parts, T& dout) {
  parts = lse - lse == T(0) && minus != T(0) ? dlse : T(0);
  dout = minus;
}
"""


def _whole_by_operators(out: Tensor, dlse: Tensor, lse: Tensor, minus: Tensor) -> list[Tensor]:
    dlse = torch.where((lse != HIDDEN) & (minus != 0), dlse, 0.0)
    return [dlse, minus.expand_as(dlse)]


def _parts(dtype: torch.dtype) -> Step:
    """Of heads of this dtype, in float32 as they lie in memory: what stands for out, and for its gradient, in a
    backward that adds up to the gradient of the log-sum-exp. `out` says how the results shall lie in memory,
    `minus` is a row of the second one. Rows that see nothing get zeros, whatever comes from above."""
    name = f"the gradient of the log-sum-exp in {dtype}"
    if dtype == torch.float32:
        return Step(name, _WHOLE, 2, _whole_by_operators)
    by_operators = functools.partial(_parts_by_operators, dtype=dtype)
    value = "lse - lse == T(0) && minus != T(0) ? dlse : T(0)"
    return Step(name, _in_words(_PARTS, value, COARSE, dtype), 2, by_operators)


def _in_words(code: str, value: str, coarse: float, dtype: torch.dtype) -> str:
    high_and_low = _HIGH_AND_LOW.replace("VALUE", value).replace("COARSE", str(coarse))
    return code.replace("HIGH_AND_LOW", high_and_low.replace("ROUND", _ROUND[dtype]))


PARTS = {dtype: _parts(dtype) for dtype in (torch.float32, *_ROUND)}


# ---- scales of heads ----

_SCALED = """
template <typename T>
T scaled_in_two(T value, T scale) {
  HIGH_AND_LOW
  return joined.number;
}
"""


def _scaled_by_operators(value: Tensor, scale: Tensor) -> tuple[Tensor]:
    scaled = value.float() * scale
    high = scaled.to(value.dtype)
    return (torch.stack((high, (scaled - high).to(value.dtype)), -1).flatten(-2).view(torch.float32),)


# A number in half precision times one in float32, as the sum of two in half precision, in float32 as they lie in
# memory.
SCALED = {
    dtype: Step(
        f"the product with a scale in {dtype}",
        _in_words(_SCALED, "value * scale", 1.0, dtype),
        1,
        _scaled_by_operators,
    )
    for dtype in _ROUND
}


# ---- scores and weights where PyTorch has no kernel ----


def _score_by_operators(
    product: Tensor, column: Tensor, row: Tensor, cap: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor]:
    distance = column - row
    score = torch.where(cap > 0, cap * torch.tanh(product / cap), product)
    return (score.masked_fill((distance < first) | (distance > last), HIDDEN),)


# The score of a scaled product under a soft cap, 0 for none; -inf for a column that is not from `first` to `last`
# behind its row.
SCORE = Step(
    "scores",
    """
template <typename T>
T score_of_product(T product, T column, T row, T cap, T first, T last) {
  T score = cap > T(0) ? cap * ::tanh(product / cap) : product;
  return column - row < first || column - row > last ? ::log(T(0)) : score;
}
""",
    1,
    _score_by_operators,
)


def _weight_by_operators(score: Tensor, pivot: Tensor) -> tuple[Tensor]:
    return (torch.exp(score - pivot.masked_fill(pivot == HIDDEN, 0.0)),)


# exp(score - pivot), 0 for -inf whatever the pivot is.
WEIGHT = Step(
    "weights",
    """
template <typename T>
T weight_of_score(T score, T pivot) {
  return score == ::log(T(0)) ? T(0) : ::exp(score - pivot);
}
""",
    1,
    _weight_by_operators,
)


def _score_gradient_by_operators(
    weight: Tensor, dweight: Tensor, delta: Tensor, product: Tensor, cap: Tensor
) -> tuple[Tensor]:
    bent = torch.where(cap > 0, torch.tanh(product / cap), 0.0)
    return (weight * (dweight - delta) * (1.0 - bent * bent),)


# The gradient of a scaled product under a soft cap.
SCORE_GRADIENT = Step(
    "the gradient of scores",
    """
template <typename T>
T gradient_of_product(T weight, T dweight, T delta, T product, T cap) {
  T bent = cap > T(0) ? ::tanh(product / cap) : T(0);
  return weight * (dweight - delta) * (T(1) - bent * bent);
}
""",
    1,
    _score_gradient_by_operators,
)


def _results_by_operators(total: Tensor, pivot: Tensor, sums: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    empty = sums == 0
    lse = pivot + torch.log(sums)
    return total / (sums * kept).masked_fill(empty, 1.0), lse.masked_fill(empty, HIDDEN).expand_as(total)


# A row's result and its log-sum-exp, from the sum of weights exp(score - pivot).
RESULTS = Step(
    "the results of rows",
    """
template <typename T>
void results_of_row(T total, T pivot, T sum, T kept, T& out, T& lse) {
  out = sum == T(0) ? total : total / (sum * kept);
  lse = sum == T(0) ? ::log(T(0)) : pivot + ::log(sum);
}
""",
    2,
    _results_by_operators,
)
OF_BLOCKS = (SCORE, WEIGHT, SCORE_GRADIENT, RESULTS)
STEPS = (SHARE, SINK_GRADIENT, *PARTS.values(), *SCALED.values(), *OF_BLOCKS)


# ---- one launch, or operators ----


def run(step: Step, *tensors: Tensor) -> Sequence[Tensor]:
    """Its results."""
    if not serves(step, tensors[0].device):
        return step.plain(*tensors)
    found = _compiled(step)(*tensors)
    return (found,) if isinstance(found, Tensor) else found


def serves(step: Step, device: torch.device) -> bool:
    """Whether it takes one launch on this device."""
    if device.type != "cuda" or not (torch.version.cuda or torch.version.hip):
        return False
    key = step.name, device
    if key not in _known:
        if capturing():
            return False  # a compilation and a comparison, which a graph cannot hold
        _known[key] = _agrees(step, device)
    return _known[key]


@functools.cache
def _compiled(step: Step) -> Callable[..., Tensor | Sequence[Tensor]]:
    if step.results == 1:
        return torch.cuda.jiterator._create_jit_fn(step.code)
    return torch.cuda.jiterator._create_multi_output_jit_fn(step.code, step.results)


def _agrees(step: Step, device: torch.device) -> bool:
    """Whether the compiled function gives what the operators give, tried on a few thousand numbers."""
    with outside_modes():
        try:
            tensors = tried(step, device)
            found = _compiled(step)(*tensors)
            found = (found,) if isinstance(found, Tensor) else found
            pairs = zip(found, step.plain(*tensors), strict=True)
            # Exponentials are rounded; the parts of a gradient are the same bits.
            most = 1e-5 if step in (SHARE, SINK_GRADIENT, *OF_BLOCKS) else 0.0
            wrong = "" if all(_close(a, b, most) for a, b in pairs) else "its results differ"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
    if wrong:
        log.warning("PyTorch's jiterator is not used for %s on %s: %s", step.name, device, wrong)
    return not wrong


def tried(step: Step, device: torch.device) -> tuple[Tensor, ...]:
    """What a step is tried on: rows (2, 3, 50) of 8 numbers, some of which see nothing."""
    count = torch.arange(2400, dtype=torch.float32, device=device).view(2, 3, 50, 8)
    lse = (count[..., 0] * 0.7).sin() * 9
    lse[:, :, ::7] = HIDDEN
    sink = torch.tensor([0.5, HIDDEN, -20.0], device=device).expand(2, 3)[..., None]
    dlse = ((count[..., 0] * 1.3).cos() * torch.exp2(count[..., 0] / 50 - 24)).masked_fill(
        lse == HIDDEN, torch.nan
    )
    # As heads lie in memory: (B, L, H, D).
    out = (count * 1.1).sin().transpose(1, 2).contiguous().transpose(1, 2)
    if step is SHARE:
        return lse, sink
    if step is SINK_GRADIENT:
        first = torch.zeros(8, device=device).index_fill_(0, torch.tensor([0], device=device), 1.0)
        return out.half().cos(), out.half(), lse[..., None], sink[..., None], dlse[..., None], first
    if step in OF_BLOCKS:
        rows, cap = dlse.nan_to_num(0.0)[..., None] * 1e3, torch.tensor([[[2.0]], [[0.0]], [[0.5]]], device=device)
        if step is SCORE:
            place = torch.arange(50, dtype=torch.float32, device=device)[:, None]
            return out * 3, place[:8, 0], place, cap, cap - 3, cap + 2
        score = torch.where(out > 0.9, HIDDEN, out)
        if step is WEIGHT:
            return score.masked_fill(rows < -9, HIDDEN), torch.where(rows < -9, HIDDEN, rows.abs())
        if step is RESULTS:
            return out, rows, torch.where(rows < -9, 0.0, rows.abs() + 1), cap + 1
        return out.cos(), out, rows, score, cap
    for dtype, scaled in SCALED.items():
        if step is scaled:
            return (out * torch.exp2(count[0, 0, :, :1] / 20 - 10)).to(dtype), sink.exp()[..., None]
    dtype = next(dtype for dtype, found in PARTS.items() if found is step)
    numbers = (*minus(dtype), *[0.0] * 14)[: 32 // dtype.itemsize]
    row = torch.tensor(numbers, dtype=dtype, device=device).view(torch.float32)
    return out, dlse[..., None], lse[..., None], row


def minus(dtype: torch.dtype) -> tuple[float, ...]:
    """What the parts of a gradient of the log-sum-exp are multiplied by."""
    return (-1.0,) if dtype == torch.float32 else (-COARSE, -1.0)


def _close(found: Tensor, expected: Tensor, most: float) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=most, atol=most, equal_nan=True)
