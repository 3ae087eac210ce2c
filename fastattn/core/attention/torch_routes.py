"""ONE table: which of PyTorch's own fused kernels computes which call of attention on an NVIDIA GPU, and why not.

A call is computed by a kernel if that can do each thing that is asked, in the call's dtype, widths and sizes, on
this GPU. The first such kernel serves, if it passes its trial (torch_trial). The dispatch, `fastattn doctor`, the
page FEATURES.md and the tests all read the table. On a CPU there is one kernel, see torch_flash.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.core.attention import (
    torch_calls,
    torch_cudnn,
    torch_dense,
    torch_efficient,
    torch_flash,
    torch_varlen,
)
from fastattn.core.attention.spec import NO_TENSORS, AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.core.attention.tiles import adds_floats
from fastattn.core.layout import heads_last
from fastattn.masks.lists import entries_of

HALVES = (torch.float16, torch.bfloat16)
# The gradient of a bias is made for every head and batch entry first: at most so many times the bias, or the
# inputs.
MOST_COPIES = 4
# Programs are numbered by batch entry, or by sequence, and by head, in 16 bits each.
MOST_PROGRAMS = torch_varlen.MOST_SEQUENCES
_SHARED = frozenset({"alibi_slopes", "relative_bias", "intervals"})
_SEQUENCES = frozenset({"key_lengths", "intervals"})


class Call(NamedTuple):
    """What the choice of a kernel depends on, beside the GPU. No tensor.

    spec: at these lengths, see AttentionSpec.at.
    given: the names of the ScoreTensors that there are.
    bias: the shape of the bias, with size 1 where it only repeats itself, and its dtype; None without one.
    shared: the names of those among _SHARED that are the same for all batch entries.
    backward: whether gradients are asked for; wanted: those of which biases; lse_gradient: from the log-sum-exp's.
    """

    dtype: torch.dtype
    heads: tuple[int, int, int]  # B, Hq, Hkv
    lengths: tuple[int, int]  # Lq, Lk
    widths: tuple[int, int]  # D, Dv
    spec: AttentionSpec
    given: frozenset[str] = frozenset()
    bias: tuple[tuple[int, ...], torch.dtype] | None = None
    shared: frozenset[str] = frozenset()
    backward: bool = False
    wanted: Wanted = Wanted()
    lse_gradient: bool = False

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec,
        tensors: ScoreTensors = NO_TENSORS,
        wanted: Wanted | None = None,
        lse_gradient: bool = False,
    ) -> Call:
        """wanted: None for a forward."""
        there = {name: t for name, t in zip(ScoreTensors._fields, tensors, strict=True) if t is not None}
        bias = (
            None
            if tensors.bias is None
            else (tuple(torch_flash.unexpanded(tensors.bias).shape), tensors.bias.dtype)
        )
        return cls(
            q.dtype,
            (q.shape[0], q.shape[1], k.shape[1]),
            (q.shape[2], k.shape[2]),
            (q.shape[3], v.shape[3]),
            spec,
            frozenset(there),
            bias,
            frozenset(n for n, t in there.items() if n in _SHARED and (t.shape[0] == 1 or t.stride(0) == 0)),
            wanted is not None,
            Wanted() if wanted is None else wanted,
            lse_gradient,
        )

    @property
    def own_causal(self) -> bool:
        """Whether PyTorch's causal mask, aligned top-left, hides what is after the diagonal."""
        return self.spec.right == 0 and self.lengths[0] == self.lengths[1]

    @property
    def windowed(self) -> bool:
        """Whether the window hides more than that."""
        return self.spec.left is not None or (self.spec.right is not None and not self.own_causal)

    @property
    def adds_numbers(self) -> bool:
        """Whether a bias that is no mask is added."""
        return "relative_bias" in self.given or (self.bias is not None and self.bias[1] != torch.bool)

    @property
    def inputs(self) -> int:
        """Elements of q, k and v."""
        (batch, heads, key_heads), (queries, keys), widths = self.heads, self.lengths, self.widths
        return batch * (heads * queries * widths[0] + key_heads * keys * sum(widths))

    @property
    def added(self) -> tuple[int, int, int, int]:
        """The shape of the tensor that says what is added to the scores and what is hidden; 1 where it repeats."""
        (batch, heads, _), lengths = self.heads, self.lengths

        def of(name: str) -> int:
            return 1 if name in self.shared else batch

        parts: list[tuple[int, ...]] = [(1, 1, 1, lengths[1])]
        parts += [] if self.bias is None else [self.bias[0]]
        parts += [(batch, 1, 1, lengths[1])] if "key_lengths" in self.given else []
        parts += [(of("intervals"), 1, *lengths)] if "intervals" in self.given else []
        parts += [(of(name), heads, *lengths) for name in ("alibi_slopes", "relative_bias") if name in self.given]
        parts += [(1, 1, *lengths)] if self.windowed else []
        parts += [] if self.spec.mask is None else [(*entries_of(self.spec.mask, batch), *lengths)]
        return tuple(map(max, zip(*parts, strict=True)))  # type: ignore[return-value]


# ---- the kernels ----


@dataclass(frozen=True)
class Kernel:
    """One of PyTorch's.

    dtypes: each with the least compute capability.
    widest: the widest heads; 0 for any.
    own_values: whether values may have a width of their own.
    pads: whether other heads are padded with zeros for it. cuDNN is picked by PyTorch, for heads as they are.
    """

    name: str
    module: ModuleType
    dtypes: tuple[tuple[torch.dtype, tuple[int, int]], ...]
    widest: int
    own_values: bool
    pads: bool = True

    def padded(self, widths: torch_calls.Widths, dtype: torch.dtype) -> torch_calls.Widths:
        """The widths of heads as it takes them: rows are a multiple of 16 bytes."""
        if not self.pads:
            return widths
        width, value_width = (-(-w * dtype.itemsize // 16) * 16 // dtype.itemsize for w in widths)
        return (width, value_width) if self.own_values else (max(width, value_width),) * 2

    def limit(self, call: Call, capability: tuple[int, int]) -> str:
        """Why it takes no such heads on a GPU of this capability; "" if it does."""
        least = dict(self.dtypes).get(call.dtype)
        if least is None:
            return f"{_short(call.dtype)}: it knows {' and '.join(_short(dtype) for dtype, _ in self.dtypes)} only"
        if capability < least:
            return f"it needs sm_{least[0]}{least[1]} for {_short(call.dtype)}"
        widths = self.padded(call.widths, call.dtype)
        if any(width * call.dtype.itemsize % 16 for width in widths):
            return "heads whose rows are not a multiple of 16 bytes"
        if max(call.heads) > MOST_PROGRAMS:
            return f"more than {MOST_PROGRAMS} batch entries or heads"
        if self.widest and max(widths) > self.widest:
            return f"heads wider than {self.widest}"
        return ""


_FROM_AMPERE = tuple((dtype, (8, 0)) for dtype in HALVES)
CUDNN = Kernel("cuDNN", torch_cudnn, _FROM_AMPERE, 256, True, pads=False)
FLASH = Kernel("flash", torch_dense, _FROM_AMPERE, 256, False)
VARLEN = Kernel("flash, sequences", torch_varlen, _FROM_AMPERE, 256, False)
EFFICIENT = Kernel(
    "memory-efficient",
    torch_efficient,
    ((torch.float16, (7, 0)), (torch.bfloat16, (8, 0)), (torch.float32, (7, 0))),
    0,
    True,
)
# The first that can serves.
KERNELS = (CUDNN, FLASH, VARLEN, EFFICIENT)


# ---- the table ----


@dataclass(frozen=True)
class Yes:
    """It does: `how`, in words, and why not this call, if some are left out."""

    how: str = ""
    unless: Callable[[Call], str] = lambda call: ""


@dataclass(frozen=True)
class No:
    """It does not: `why`, in words."""

    why: str


@dataclass(frozen=True)
class Row:
    """A thing that may be asked of attention, when it is, and what each of KERNELS does about it.

    example: what a Call has that asks it, beside a plain one's.
    """

    name: str
    asked: Callable[[Call], bool]
    answers: tuple[Yes | No, ...]
    example: tuple[tuple[str, Any], ...]


def _row(name: str, asked: Callable[[Call], bool], *answers: Yes | No, **example: Any) -> Row:
    return Row(name, asked, answers if len(answers) > 1 else answers * len(KERNELS), tuple(example.items()))


def _given(name: str, field: str, *answers: Yes | No, **example: Any) -> Row:
    """A row for one of the ScoreTensors."""
    return _row(name, lambda call: field in call.given, *answers, given=frozenset({field}), **example)


def _too_long(call: Call) -> str:
    """The operator counts the elements of a batch entry in 32 bits."""
    shape = (call.heads[1], *call.lengths) if call.wanted != Wanted() else call.added[1:]
    return "2**31 numbers and more in a batch entry" if math.prod(shape) >= 2**31 else ""


def _too_large(call: Call) -> str:
    given = 0 if call.bias is None else math.prod(call.bias[0])
    if math.prod(call.added) > max(call.inputs, given):
        return "its tensor is larger than the inputs"
    return _too_long(call)


def _gradient_too_large(call: Call) -> str:
    given = 0 if call.bias is None else math.prod(call.bias[0])
    whole = math.prod((*call.heads[:2], *call.lengths))
    return "it is made for every head first" if whole > MOST_COPIES * max(call.inputs, given) else _too_long(call)


def _no_sequences(call: Call) -> str:
    if call.spec.left is not None:
        return "beside a window before the diagonal"
    if call.spec.right is not None and "intervals" in call.given:
        return "beside a causal mask"
    return "too many" if 4 * call.heads[0] > MOST_PROGRAMS else ""


_ADDED = Yes("as a tensor that is added, if that is no larger than the inputs", _too_large)
_DENSE = No("it is for sequences")
_BESIDE_LENGTHS = Yes("beside key lengths", lambda c: "" if c.given & _SEQUENCES else _DENSE.why)
_NO_MASK = No("its gradients are NaN beside a mask in some versions")
_NO_BIAS = No("it adds nothing to scores")
_NO_SLOPES = No("it is built without slopes")
_BY_LENGTHS = Yes("as sequences; in two calls if causal; not beside windows before the diagonal", _no_sequences)
_CAUSAL = AttentionSpec(causal=True)

ROWS: tuple[Row, ...] = (
    _row(
        "full", lambda c: not (c.own_causal or c.windowed or c.given & _SEQUENCES),
        Yes(), Yes(), _DENSE, Yes(),
    ),
    _row(
        "causal, as many queries as keys", lambda c: c.own_causal,
        Yes(), Yes(), _BESIDE_LENGTHS, Yes(), spec=_CAUSAL,
    ),
    _row(
        "causal, other lengths; windows", lambda c: c.windowed,
        No("its causal mask begins at the first key"), Yes(), _BESIDE_LENGTHS, _ADDED,
        spec=AttentionSpec(window=(64, 0)),
    ),
    _given(
        "key lengths", "key_lengths",
        _NO_MASK, _NO_BIAS, _BY_LENGTHS, _ADDED,
    ),
    _given(
        "documents, packed sequences", "intervals",
        _NO_MASK, _NO_BIAS, Yes("if full or causal, with windows before the diagonal", _no_sequences), _ADDED,
    ),
    _row(
        "documents beside key lengths", lambda c: c.given >= _SEQUENCES,
        _NO_MASK, _NO_BIAS, No("they are sequences in two ways"), _ADDED, given=_SEQUENCES,
    ),
    _given(
        "boolean mask, bias", "bias",
        _NO_MASK, _NO_BIAS, _NO_BIAS, Yes("in float32 if the bias is", _too_long),
        bias=((1, 8, 1024, 1024), torch.bfloat16),
    ),
    _row(
        "gradient of a bias", lambda c: c.wanted.bias or c.wanted.relative_bias,
        _NO_BIAS, _NO_BIAS, _NO_BIAS, Yes("if that of every head is not much larger", _gradient_too_large),
        given=frozenset({"bias"}), bias=((8, 8, 1024, 1024), torch.bfloat16), backward=True, wanted=Wanted(True),
    ),
    _given(
        "ALiBi slopes", "alibi_slopes",
        _NO_BIAS, _NO_SLOPES, _NO_SLOPES, _ADDED, shared=frozenset({"alibi_slopes"}),
    ),
    _given(
        "relative bias", "relative_bias",
        _NO_BIAS, _NO_BIAS, _NO_BIAS, Yes(f"{_ADDED.how}; in float32", _too_large),
        shared=frozenset({"relative_bias"}),
    ),
    _given("sinks, with gradient", "sinks", Yes("afterwards, from the log-sum-exp")),
    _row(
        "sinks beside a bias of numbers", lambda c: "sinks" in c.given and c.adds_numbers,
        No("a huge bias rounds the log-sum-exp, and so the share of the sink"),
        given=frozenset({"sinks", "bias"}), bias=((1, 8, 1024, 1024), torch.bfloat16),
    ),
    _given(
        "block lists", "mask",
        _NO_MASK, _NO_BIAS, No("no sequences"), Yes(f"{_ADDED.how}; it is kept for further calls", _too_large),
        spec=AttentionSpec(mask=(1, 16, 16, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0)),
    ),
    _row("soft cap", lambda c: c.spec.softcap > 0,
         No("none of PyTorch's has one but flex_attention, which must be compiled"),
         spec=AttentionSpec(softcap=30.0)),
    _given(
        "dropout", "dropout_state",
        No("it draws random numbers of its own; ours depend on seed and position alone, in every backend"),
    ),
    _given("scale of each head", "head_scale", No("q is scaled before, and the rest looked up here")),
    _row("bits that do not depend on the batch", lambda c: c.spec.invariant, No("it splits the work by sizes"),
         spec=AttentionSpec(invariant=True)),
    _row("gradient of the log-sum-exp", lambda c: c.lse_gradient, Yes("by a second backward, without values"),
         backward=True, lse_gradient=True),
)  # fmt: skip


# What no row names is done by no kernel.
_NAMED = frozenset().union(*(dict(row.example).get("given", ()) for row in ROWS))


def example(row: Row, dtype: torch.dtype = torch.bfloat16) -> Call:
    """A call that asks it, of 8 x 8 heads, 1,024 tokens and 64 numbers."""
    call = Call(dtype, (8, 8, 8), (1024, 1024), (64, 64), AttentionSpec())._replace(**dict(row.example))
    return call if call.bias is None else call._replace(bias=(call.bias[0], dtype))


def obstacles(call: Call, capability: tuple[int, int]) -> dict[str, str]:
    """Of each kernel, by name, why it does not compute the call; "" if it does."""
    return {kernel.name: _obstacle(number, call, capability) for number, kernel in enumerate(KERNELS)}


def _obstacle(number: int, call: Call, capability: tuple[int, int]) -> str:
    if 0 in (*call.heads, *call.lengths, *call.widths):
        return "nothing is to be computed"
    limit = KERNELS[number].limit(call, capability)
    if limit:
        return limit
    if not call.given <= _NAMED:
        return f"{', '.join(sorted(call.given - _NAMED))}: not in the table"
    for row in ROWS:
        answer = row.answers[number]
        if row.asked(call):
            why = answer.why if isinstance(answer, No) else answer.unless(call)
            if why:
                return f"{row.name}: {why}"
    return ""


@functools.lru_cache(maxsize=1024)
def candidates(call: Call, capability: tuple[int, int]) -> tuple[Kernel, ...]:
    """The kernels that compute it, the first ones first."""
    lacking = obstacles(call, capability)
    return tuple(kernel for kernel in KERNELS if not lacking[kernel.name])


# ---- dispatch ----


def serving(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    wanted: Wanted | None = None,
    dlse: Tensor | None = None,
) -> ModuleType | None:
    """The module of the kernel that computes this call, a backward if there is a `wanted`; None for none."""
    if q.device.type == "cpu":
        serves = torch_flash.serves if wanted is None else torch_flash.serves_backward
        asks = dlse is not None or (wanted is not None and wanted.bias)
        # See the table: sinks beside a bias.
        rest = tensors if adds_floats(tensors) else torch_calls.without_sinks(tensors)
        return None if asks or not serves(q, k, v, spec, rest) else torch_flash
    if q.device.type != "cuda" or torch.version.cuda is None:
        return None
    call = Call.of(q, k, v, spec, tensors, wanted, dlse is not None)
    rest = torch_calls.without_sinks(tensors)
    for kernel in candidates(call, torch.cuda.get_device_capability(q.device)):
        width, value_width = kernel.padded(call.widths, q.dtype)
        heads = torch_calls.wide(q, width), torch_calls.wide(k, width), torch_calls.wide(v, value_width)
        ready = kernel.module.ready(*heads, spec, rest)
        if ready and (dlse is None or torch_calls.takes_lse_gradient(kernel.module, *heads, spec, rest)):
            return kernel.module
    return None


def forward(
    module: ModuleType, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors
) -> tuple[Tensor, Tensor]:
    """By the module that `serving` returned."""
    return torch_calls.forward(module, _widths(module, q, v), q, k, v, spec, tensors)


def backward(
    module: ModuleType,
    dout: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    wanted: Wanted,
    finite: bool = False,
) -> Gradients:
    """finite: whether the caller knows that every log-sum-exp is."""
    widths = _widths(module, saved.q, saved.v)
    return torch_calls.backward(module, widths, dout, dlse, saved, spec, tensors, wanted, finite)


def _widths(module: ModuleType, q: Tensor, v: Tensor) -> torch_calls.Widths:
    """The widths of heads as the module takes them."""
    widths = q.shape[3], v.shape[3]
    return next((kernel.padded(widths, q.dtype) for kernel in KERNELS if kernel.module is module), widths)


class Plain(NamedTuple):
    """Flash attention of a call that needs nothing else, and no trial."""

    spec: AttentionSpec

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch_dense.forward(q, k, v, self.spec)
        return heads_last(out), lse

    def backward(self, dout: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        """saved: q, k, v, out and lse."""
        of = torch_dense.backward(dout, Saved(*saved), self.spec)
        return heads_last(of.q), heads_last(of.k), heads_last(of.v)


def plain(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Plain | None:
    """Where flash attention serves a call on a GPU that is full or causal. cuDNN is looked up in each call, as
    PyTorch picks it by settings that may change."""
    if q.device.type != "cuda" or torch_flash.hides_by_window(q, k, spec):
        return None
    if serving(q, k, v, spec, NO_TENSORS) is not torch_dense:
        return None
    return Plain(spec) if _widths(torch_dense, q, v) == (q.shape[3], v.shape[3]) else None


# ---- in words ----

Cells = tuple[str, ...]


def served(capability: tuple[int, int]) -> list[Cells]:
    """For each thing that may be asked, which kernel computes an example of it on a GPU of this capability, by
    dtype, and why none does where none does. The first row holds the headings."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    found: list[Cells] = [("asked", *map(_short, dtypes), "why none")]
    for row in ROWS:
        calls = [example(row, dtype) for dtype in dtypes]
        names = [_names(candidates(call, capability)) for call in calls]
        # What the kernel that can do the most lacks, without the name of the row.
        lacking = [obstacles(call, capability)[EFFICIENT.name] for call in calls]
        found.append((row.name, *names, next(filter(None, lacking), "").rpartition(": ")[2]))
    return found


def _names(kernels: tuple[Kernel, ...]) -> str:
    """The one that serves; behind cuDNN, which PyTorch must pick, the next one, too."""
    count = 2 if CUDNN in kernels else 1
    return " or ".join(kernel.name for kernel in kernels[:count]) or "—"


def name_of(module: ModuleType | None) -> str:
    """Of what `serving` returned."""
    if module is torch_flash:
        return "PyTorch's flash for CPUs"
    return next((f"PyTorch's {k.name}" for k in KERNELS if k.module is module), "steps of PyTorch's")


def markdown() -> str:
    """The table as Markdown, and below it the limits of each kernel."""
    lines = [
        "| asked | " + " | ".join(kernel.name for kernel in KERNELS) + " |",
        "|---" * (len(KERNELS) + 1) + "|",
    ]
    lines += [f"| {row.name} | " + " | ".join(map(_cell, row.answers)) + " |" for row in ROWS]
    lines += ["", "| kernel | dtypes | head widths |", "|---|---|---|"]
    for kernel in KERNELS:
        dtypes = ", ".join(f"{_short(dtype)} from sm_{a}{b}" for dtype, (a, b) in kernel.dtypes)
        widths = f"to {kernel.widest}" if kernel.widest else "any"
        own = "" if kernel.own_values else ", values as wide as keys"
        pads = "; others are padded with zeros" if kernel.pads else ""
        lines.append(f"| {kernel.name} | {dtypes} | {widths}{own}, rows of a multiple of 16 bytes{pads} |")
    return "\n".join(lines)


def _cell(answer: Yes | No) -> str:
    return f"— {answer.why}" if isinstance(answer, No) else f"✓ {answer.how}".rstrip()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
