"""The public calls that the report compiles: together they launch every kernel with every row of its table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.compile_report.targets import Target
from fastattn.core.attention.spec import AttentionSpec, ScoreTensors, Tangents, Wanted
from fastattn.core.cache.spec import CacheSpec, CacheTensors, Storage
from fastattn.core.statistics.spec import SUMS, StatisticsSpec, StatisticsTensors, empty_results
from fastattn.kernels.attention.backward import attention_backward
from fastattn.kernels.attention.forward import attention_forward
from fastattn.kernels.attention.statistics import attention_statistics
from fastattn.kernels.attention.tangent import attention_tangent
from fastattn.kernels.cache import cache_append, cache_attention
from fastattn.kernels.heads import prepare_heads, prepare_heads_backward
from fastattn.kernels.invariant import invariant_attention, invariant_cache_attention
from fastattn.kernels.invariant_backward import invariant_backward
from fastattn.kernels.launch.whole_mlp import GATED_AT_ONCE
from fastattn.kernels.loss import Loss, loss_gradients, loss_rows
from fastattn.kernels.mlp.backward import GradientTask, hidden_backward
from fastattn.kernels.mlp.folded_norm import Norm
from fastattn.kernels.mlp.forward import hidden_forward
from fastattn.kernels.mlp.output import After, output_forward, output_pass
from fastattn.kernels.mlp.problem import Dropout, Layer
from fastattn.kernels.norm import norm_backward, norm_forward
from fastattn.kernels.whole_mlp import whole_forward, whole_input_gradient, whole_weight_gradients
from fastattn.masks import BlockLists

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _heads() -> torch.Tensor:
    return torch.empty((4, 16), device="meta")


def _shapes(batch: int, heads: int, length: int) -> dict[str, dict]:
    """The options that change scores, one by one and several at once. Of tensors only shapes, strides and dtypes
    matter here."""

    def by_head() -> torch.Tensor:
        return torch.empty((batch, heads), device="meta")

    def bias(*shape: int, dtype: torch.dtype = torch.bfloat16) -> dict:
        return {"bias": torch.empty(shape, dtype=dtype, device="meta")}

    def dropout(numbers: int) -> dict:
        return {
            "dropout": 0.125,
            "dropout_state": torch.empty((batch, numbers), dtype=torch.int64, device="meta"),
        }

    lengths = torch.empty(batch, dtype=torch.int32, device="meta")
    shapes: dict[str, dict] = {
        "window": {"window": (512, None)},
        "softcap": {"softcap": 30.0},
        "alibi": {"alibi_slopes": by_head()},
        "sinks and lengths": {"sinks": by_head(), "key_lengths": lengths},
    }
    shapes["everything"] = {name: value for shape in list(shapes.values()) for name, value in shape.items()}
    intervals = torch.empty((batch, 2, 2 * length), dtype=torch.int32, device="meta")
    shapes |= {
        "intervals": {"causal": False, "intervals": intervals},
        "lists": {"lists": _lists(False)},
        "lists that count": {"lists": _lists(True)},
        "bias": bias(batch, heads, length, length),
        "bool mask": bias(batch, 1, length, length, dtype=torch.bool),
        "padding as bias": bias(batch, 1, 1, length),
        "relative bias": {"relative_bias": torch.empty((batch, heads, 257), device="meta")},
        "dropout": dropout(2),
        "dropout of a part": dropout(5),
        "tf32": {"precision": "tf32"},
        "tf32x3": {"precision": "tf32x3"},
    }  # fmt: skip
    heavy = ("everything", "bias", "relative bias", "dropout")
    shapes["everything and heavy"] = {name: value for shape in heavy for name, value in shapes[shape].items()}
    return shapes


def _lists(counted: bool) -> BlockLists:
    """Block lists of one mask for all heads."""

    def take(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    counts = take(512, dtype=torch.float32) if counted else None
    half = (take(1, 65), take(512), take(1, 65), take(512), take(512), counts, counts)
    shared = (take(68, 4), take(2, 3))
    return BlockLists(*half, *half, take(64, 64, dtype=torch.int64), take(1, 1), *shared, *shared)


SHAPES = _shapes(4, 16, 4096)
UNEVEN_LENGTH = 1023
UNEVEN_SHAPES = _shapes(1, 4, UNEVEN_LENGTH)


@dataclass(frozen=True)
class AttentionCall:
    """Forward and backward at a common training shape: 16 query heads on 4 key heads, 4096 tokens."""

    dtype: str
    head_dim: int
    causal: bool
    value_dim: int | None = None
    shaped: str = ""  # a key of SHAPES

    shapes: ClassVar[dict[str, dict]] = SHAPES

    @property
    def name(self) -> str:
        width = str(self.head_dim) if self.value_dim is None else f"{self.head_dim}/{self.value_dim}"
        shaped = f" {self.shaped}" if self.shaped else ""
        return f"attention {self.dtype} D={width} {'causal' if self.causal else 'full'}{shaped}"

    def run(self) -> None:
        q = self.heads(16, self.head_dim)
        k = self.heads(4, self.head_dim)
        v = self.heads(4, self.value_dim or self.head_dim)
        spec, tensors, lists = self.asked()
        out, lse = attention_forward(q, k, v, spec, tensors, lists)
        # A bool mask has no gradient.
        wanted = Wanted(tensors.bias is not None and tensors.bias.is_floating_point(), True)
        attention_backward(out, None, (q, k, v, out, lse), spec, tensors, wanted, lists)

    def asked(self) -> tuple[AttentionSpec, ScoreTensors, BlockLists | None]:
        """The call's options, the tensors that shape its scores, and its block lists."""
        ask = dict(self.shapes.get(self.shaped, {}))
        lists = ask.pop("lists", None)
        tensors = ScoreTensors(**{name: ask.pop(name) for name in ScoreTensors._fields if name in ask})
        return AttentionSpec(**{"causal": self.causal, "scale": self.head_dim**-0.5, **ask}), tensors, lists

    def heads(self, heads: int, width: int) -> torch.Tensor:
        """As a linear layer returns them: (batch, tokens, heads, width) in memory, (batch, heads, tokens, width)
        as shape."""
        shape = (4, 4096, heads, width)
        return torch.empty(shape, dtype=DTYPES[self.dtype], device="meta").transpose(1, 2)


@dataclass(frozen=True)
class AbsorbedCall(AttentionCall):
    """Keys wider than 512, one head of them, without a backward."""

    def run(self) -> None:
        q, k, v = self.heads(16, self.head_dim), self.heads(1, self.head_dim), self.heads(1, self.value_dim)
        attention_forward(q, k, v, *self.asked())


@dataclass(frozen=True)
class UnevenCall(AttentionCall):
    """The same of one short sequence: 4 query heads on 2 key heads, 1023 tokens. So few programs split their
    loops, and a length that is no multiple of 16 makes another kernel. So does a head dimension that a tile is
    padded for. `many`: a batch of such sequences, of which no loop is split."""

    many: bool = False

    shapes: ClassVar[dict[str, dict]] = UNEVEN_SHAPES
    compared: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"{super().name} uneven{' many' if self.many else ''}"

    def heads(self, heads: int, width: int) -> torch.Tensor:
        shape = (40 if self.many else 1, UNEVEN_LENGTH, {16: 4, 4: 2}[heads], width)
        return torch.empty(shape, dtype=DTYPES[self.dtype], device="meta").transpose(1, 2)


@dataclass(frozen=True)
class TangentCall(AttentionCall):
    """Forward mode, with the tangents of q, k and v."""

    @property
    def name(self) -> str:
        return f"{super().name} tangent"

    def run(self) -> None:
        q, k = self.heads(16, self.head_dim), self.heads(4, self.head_dim)
        lse = torch.empty((4, 16, 4096), device="meta")
        spec, tensors, lists = self.asked()
        attention_tangent((q, k, k, q, lse), Tangents(q, k, k), spec, tensors, lists)


@dataclass(frozen=True)
class PaddedTangentCall(TangentCall):
    """The same of a head dimension that a tile is padded for."""

    compared: ClassVar[bool] = False


@dataclass(frozen=True)
class StatisticsCall(AttentionCall):
    """All statistics that have a kernel: by query, by key and by lag."""

    want: tuple[str, ...] = tuple(name for name in SUMS if name != "top_keys")

    @property
    def name(self) -> str:
        alone = f" {' '.join(self.want)}" if len(self.want) < len(SUMS) - 1 else ""
        return f"{super().name.replace('attention', 'statistics', 1)}{alone}"

    def run(self) -> None:
        q, k = self.heads(16, self.head_dim), self.heads(4, self.head_dim)
        lse = torch.empty((4, 16, 4096), device="meta")
        attention, tensors, lists = self.asked()
        before = (0, 1) if "match_mass" in self.want else ()
        thumbnail = (64, 64) if "thumbnail" in self.want else (0, 0)
        spec = StatisticsSpec(attention, self.want, (0, 4096), 0, thumbnail, before)
        labels = torch.empty((2, 4, 4096), dtype=torch.int32, device="meta")
        bins = torch.empty(4096, dtype=torch.int32, device="meta")
        asked = StatisticsTensors(lse, lse, labels, labels, bins, lse if self.shaped == "bias" else None)
        attention_statistics(q, k, lse, spec, asked, tensors, lists, empty_results(spec, q, k))


@dataclass(frozen=True)
class MLPCall:
    """Forward, in training, and backward of an MLP's hidden layer, d to 4 d to d."""

    dtype: str
    width: int
    activation: str
    gated: bool = False
    fused: bool | None = None
    tokens: int = 8192
    biases: bool = True
    save: str = "preactivation"
    packed: str = ""

    @property
    def name(self) -> str:
        route = {None: "", True: " fused", False: " library"}[self.fused]
        family = "gated_mlp" if self.gated else "mlp"
        bare = "" if self.biases else " without biases"
        more = ("" if self.save == "preactivation" else f" {self.save}") + (
            f" {self.packed}" if self.packed else ""
        )
        return f"{family} {self.dtype} T={self.tokens} d={self.width} {self.activation}{route}{bare}{more}"

    def run(self) -> None:
        hidden = 4 * self.width
        x, dy = self.matrix(self.tokens, self.width), self.matrix(self.tokens, self.width)
        rows = 2 * hidden if self.packed else hidden
        linear = self.matrix(rows, self.width), self.matrix(rows) if self.biases else None
        linears = [linear] * (2 if self.gated and not self.packed else 1)
        layer = Layer(linears, self.packed, self.activation, hidden)
        _, (kept, *scales) = hidden_forward(x, layer, self.save, self.fused)
        state = (*layer.halves(kept, 1), *layer.halves(scales[0] if scales else None, 1))
        hidden_backward(dy, self.matrix(self.width, hidden), state, layer, GradientTask(), self.fused)

    def matrix(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPES[self.dtype], device="meta")


@dataclass(frozen=True)
class BranchCall(MLPCall):
    """What a residual branch adds to an MLP: a norm in its first product, dropout and the residual after its
    second; library: the passes of their own instead."""

    norm: str = ""
    after: str = ""  # some of "dropout" and "residual"

    @property
    def name(self) -> str:
        return f"branch of {super().name}: {' '.join(filter(None, (self.norm, self.after)))}"

    def run(self) -> None:
        hidden = 4 * self.width
        x, of_norm = self.matrix(self.tokens, self.width), self.matrix(self.width)
        if self.norm:
            linears = [(self.matrix(hidden, self.width), self.matrix(hidden))] * (1 + self.gated)
            norm = Norm(of_norm, of_norm if self.norm == "layer" else None, self.norm == "layer", 1e-6)
            hidden_forward(x, Layer(linears, "", self.activation, hidden), "nothing", self.fused, norm)
        if self.after:
            dropout = Dropout(torch.empty((1, 2), dtype=torch.int64, device="meta"), 6554, 1.1, 0)
            after = After(x if "residual" in self.after else None, dropout if "dropout" in self.after else None)
            weight = self.matrix(self.width, hidden)
            output_forward(self.matrix(self.tokens, hidden), weight, of_norm, after, fused=self.fused)
            if not self.fused and after.dropout:
                output_pass(x, After(dropout=dropout))


@dataclass(frozen=True)
class WholeMLPCall(MLPCall):
    """The same in one kernel, which keeps nothing of the hidden layer. The weights of a wide gated layer take two
    launches, the first layers' here and the last one's with `last`."""

    last: bool = False

    @property
    def name(self) -> str:
        return f"whole {super().name}{' last weight' if self.last else ''}"

    def run(self) -> None:
        hidden = 4 * self.width
        x, weight = self.matrix(self.tokens, self.width), self.matrix(self.width, hidden)
        linear = self.matrix(hidden, self.width), self.matrix(hidden)
        layer = Layer([linear] * (2 if self.gated else 1), "", self.activation, hidden)
        if self.last:
            whole_weight_gradients(x, x, layer, weight, (False, False, True))
            return
        whole_forward(x, layer, weight, self.matrix(self.width))
        whole_input_gradient(x, x, layer, weight)
        at_once = not self.gated or self.width <= GATED_AT_ONCE
        whole_weight_gradients(x, x, layer, weight, (True, True, at_once))


@dataclass(frozen=True)
class HeadsCall:
    """Forward and backward of 16 heads of 4096 tokens on their way to attention: norm, rotary and scale."""

    dtype: str
    head_dim: int
    turned: int
    layout: str = "half"  # or "interleaved"
    everything: bool = True  # or the rotation alone

    @property
    def name(self) -> str:
        width = f"D={self.head_dim} turned={self.turned} {self.layout}"
        return f"heads {self.dtype} {width} {'everything' if self.everything else 'alone'}"

    def run(self) -> None:
        x = torch.empty((4, 4096, 16, self.head_dim), dtype=DTYPES[self.dtype], device="meta").transpose(1, 2)
        cos = sin = torch.empty((1, 8192, self.turned // 2), device="meta").expand(4, -1, -1)
        ask: dict = {"cos": cos, "sin": sin, "interleaved": self.layout == "interleaved"}
        if self.everything:
            ask["norm_weight"] = torch.empty(self.head_dim, device="meta").expand(4, 16, -1)
            ask["offsets"] = torch.empty(4, dtype=torch.int32, device="meta")
            ask |= {"head_scale": _heads(), "eps": 1e-6}
        y = prepare_heads(x, **ask)
        prepare_heads_backward(y, x, **ask)


@dataclass(frozen=True)
class NormCall:
    """Forward and backward of 8192 rows: layer norm with weight, bias and residual, or RMS norm with a weight."""

    dtype: str
    width: int
    centred: bool = True

    @property
    def name(self) -> str:
        return f"{'layer' if self.centred else 'rms'}_norm {self.dtype} W={self.width}"

    def run(self) -> None:
        x = torch.empty((1, 8192, self.width), dtype=DTYPES[self.dtype], device="meta")
        weight = torch.empty((1, self.width), dtype=DTYPES[self.dtype], device="meta")
        residual, bias = (x, weight) if self.centred else (None, None)
        _, total, *moments = norm_forward(x, residual, weight, bias, centred=self.centred, eps=1e-6)
        norm_backward(x, total, (x, weight, *moments), wanted=(True, self.centred))


@dataclass(frozen=True)
class LossCall:
    """Forward and backward of the loss of 8192 tokens over 32768 classes."""

    dtype: str
    width: int
    options: str = ""  # some of "bias", "weights", "softcap", "smoothing", "entropy", "probabilities", "filter"
    classes: int = 32768

    @property
    def name(self) -> str:
        classes = "" if self.compared else f" V={self.classes}"
        return f"loss {self.dtype} d={self.width}{classes} {self.options or 'plain'}"

    @property
    def compared(self) -> bool:
        """Whether rows of classes begin at multiples of 16, as in most models."""
        return self.classes % 16 == 0

    def run(self) -> None:
        tokens, classes, asked = 8192, self.classes, self.options.split()
        x, w = self.tensor(tokens, self.width), self.tensor(classes, self.width)
        loss = Loss(
            softcap=30.0 if "softcap" in asked else 0.0,
            temperature=1.0,
            smoothing=0.1 if "smoothing" in asked else 0.0,
            classes=classes,
            entropy="entropy" in asked,
            target=self.tensor(tokens, classes) if "probabilities" in asked else None,
            class_weight=torch.empty(classes, device="meta") if "weights" in asked else None,
            filter=1e-7 if "filter" in asked else 0.0,
        )
        b = self.tensor(classes) if "bias" in asked else None
        own = None if "probabilities" in asked else torch.empty(tokens, dtype=torch.int32, device="meta")
        loss_rows(x, w, b, own, loss)
        values = torch.empty((7, tokens), device="meta")
        loss_gradients(x, w, b, own, values, loss, (True, True, True))

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPES[self.dtype], device="meta")


@dataclass(frozen=True)
class CacheCall:
    """New tokens of 4 rows written to a cache of up to 8192 tokens in pages of 16, and attention to it: 32 query
    heads on 8 key heads, or `heads` on one for keys that hold the values."""

    dtype: str
    head_dim: int
    queries: int = 1
    value_dim: int | None = None  # of values that are columns of the keys
    shaped: bool = False
    paged: bool = True
    stored: str = ""  # "int8" or "fp8" in a quantised cache
    by_page: bool = False  # a scale for each page instead of each token
    heads: int = 32

    @property
    def name(self) -> str:
        width = str(self.head_dim) if self.value_dim is None else f"{self.head_dim}/{self.value_dim}"
        kind = f"{'pages' if self.paged else 'contiguous'}{' everything' if self.shaped else ''}"
        stored = f" {self.stored}{' by page' if self.by_page else ''}" if self.stored else ""
        heads = "" if self.heads == 32 else f" {self.heads} heads"
        return f"cache {self.dtype} D={width} queries={self.queries} {kind}{stored}{heads}"

    @property
    def token_bytes(self) -> int:
        """Of a key and its value."""
        numbers = self.head_dim if self.value_dim else 2 * self.head_dim
        return numbers * (1 if self.stored else DTYPES[self.dtype].itemsize)

    def run(self) -> None:
        key_heads = 8 if self.value_dim is None else 1
        pages, page = (2048, 16) if self.paged else (4, 8192)
        keys, scales = self.tensor(pages, key_heads, page, self.head_dim), None
        if self.stored:
            keys = keys.to({"int8": torch.int8, "fp8": torch.float8_e4m3fn}[self.stored])
            scales = torch.empty(keys.shape[: 2 if self.by_page else 3], device="meta")
        storage = Storage(keys, None, scales) if self.value_dim else Storage(keys, keys, scales, scales)
        q = self.tensor(4, self.queries, self.heads, self.head_dim).transpose(1, 2)
        new = self.tensor(4, self.queries, key_heads, self.head_dim).transpose(1, 2)
        integers = torch.empty(4, dtype=torch.int32, device="meta")
        table = torch.empty((4, 512), dtype=torch.int32, device="meta") if self.paged else None
        tensors = CacheTensors(integers, block_table=table)
        score_options = AttentionSpec(causal=True, scale=self.head_dim**-0.5)
        if self.shaped:
            slopes = torch.empty((4, self.heads), device="meta")
            tree = torch.empty((4, self.queries, self.queries), dtype=torch.bool, device="meta")
            tensors = CacheTensors(integers, integers, table, slopes, slopes, tree)
            score_options = AttentionSpec(True, self.head_dim**-0.5, (512, None), 30.0)
        cache_append(storage, new, None if self.value_dim else new, tensors)
        cache_attention(q, storage, CacheSpec(score_options, self.value_dim or self.head_dim), tensors)

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPES[self.dtype], device="meta")


@dataclass(frozen=True)
class InvariantCall:
    """Attention whose bits depend on each row alone, and its backward: 4 x 1024 queries on as many keys, packed
    sequences, or one query of each of 4 rows of a cache in pages; 16 query heads on 4 key heads."""

    dtype: str
    head_dim: int
    kind: str = "causal"  # or "packed", "everything", "cache", "cache everything"

    @property
    def name(self) -> str:
        return f"invariant {self.dtype} D={self.head_dim} {self.kind}"

    def run(self) -> None:
        cached = self.kind.startswith("cache")
        q = self.tensor(4, 1 if cached else 1024, 16, self.head_dim).transpose(1, 2)
        spec = AttentionSpec(True, self.head_dim**-0.5, invariant=True)
        lengths, by_head = torch.empty(4, dtype=torch.int32, device="meta"), _heads()
        tensors = ScoreTensors(key_lengths=lengths)
        if self.kind.endswith("everything"):
            spec = AttentionSpec(True, self.head_dim**-0.5, (512, None), 30.0, invariant=True)
            tensors = ScoreTensors(lengths, by_head, sinks=by_head, head_scale=by_head)
        if cached:
            keys = self.tensor(2048, 4, 16, self.head_dim)
            table = torch.empty((4, 512), dtype=torch.int32, device="meta")
            beside = (by_head, by_head) if self.kind.endswith("everything") else (None, None)
            rows = CacheTensors(lengths, None, table, *beside)
            invariant_cache_attention(q, Storage(keys, keys), CacheSpec(spec, self.head_dim), rows, 8192)
            return
        k = self.tensor(4, 1024, 4, self.head_dim).transpose(1, 2)
        if self.kind == "packed":
            spec = AttentionSpec(False, self.head_dim**-0.5, invariant=True)
            intervals = torch.empty((4, 2, 2048), dtype=torch.int32, device="meta")
            spans = torch.empty((4, 3, 4), dtype=torch.int32, device="meta")
            tensors = ScoreTensors(intervals=intervals, sequences=spans)
        out, lse = invariant_attention(q, k, k, spec, tensors)
        dlse = lse if self.kind == "everything" else None
        invariant_backward(out, dlse, (q, k, k, out, lse), spec, tensors)

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPES[self.dtype], device="meta")


# Not compiled for AMD's target: the tables have no rows for it, and it compiles ten times slower.
NOT_ON_AMD = (
    "bias", "bool mask", "padding as bias", "relative bias", "dropout", "dropout of a part", "intervals", "lists",
    "lists that count",
    "tf32", "tf32x3",
)  # fmt: skip
Call = AttentionCall | MLPCall | HeadsCall | NormCall | LossCall | CacheCall | InvariantCall

WIDTHS = (64, 128, 256, 512)  # a class of rows each

# Caches whose keys hold the values: the dtypes, queries, scores and stored numbers that have rows of their own.
LATENT = (
    ("bf16", 1, False, ""), ("bf16", 1, True, ""), ("bf16", 512, True, ""), ("bf16", 1, False, "int8"),
    ("bf16", 1, True, "int8"), ("fp32", 1, False, ""), ("fp32", 1, True, ""), ("fp32", 512, False, ""),
    ("fp32", 512, True, ""), ("fp32", 1, True, "int8"), ("fp32", 512, True, "int8"),
)  # fmt: skip

CALLS: tuple[Call, ...] = (
    *(
        UnevenCall("bf16", width, causal, shaped=shape)
        for width in WIDTHS
        for causal, shape in (
            (True, ""),
            (False, ""),
            (True, "everything"),
            (True, "bias"),
            (True, "everything and heavy"),
            (False, "bool mask"),
            (False, "lists"),
            (False, "intervals"),
        )
    ),
    # Padded tiles: multiples of 8 alone, and of 16, in each class.
    *(UnevenCall("bf16", width, True) for width in (40, 72, 136, 264, 96, 160)),
    *(UnevenCall("bf16", width, True, many=True) for width in (40, 64, 96, 128, 160, 256)),
    UnevenCall("bf16", 128, False, many=True),
    UnevenCall("bf16", 72, True, shaped="everything and heavy"),
    *(
        InvariantCall(dtype, width, kind)
        for dtype, width, kind in (
            *(("bf16", width, "everything") for width in (64, 128, 256)),
            *(("fp32", width, "everything") for width in (64, 128)),
            ("bf16", 64, "causal"),
            ("bf16", 64, "packed"),
            ("bf16", 64, "cache"),
            ("bf16", 128, "causal"),
            ("bf16", 128, "packed"),
            ("bf16", 128, "cache"),
            ("bf16", 128, "cache everything"),
        )
    ),
    *(AttentionCall("bf16", width, causal) for width in WIDTHS for causal in (True, False)),
    AttentionCall("bf16", 80, True),
    AttentionCall("bf16", 192, True, value_dim=128),
    AttentionCall("bf16", 320, True, value_dim=512),
    AttentionCall("fp16", 128, True),
    *(
        AttentionCall("bf16", width, True, shaped=shape)
        for width in WIDTHS
        for shape in ("window", "everything", "bias", "relative bias", "dropout", "lists")
    ),
    *(AttentionCall("bf16", width, True, shaped="dropout of a part") for width in WIDTHS[:2]),
    *(
        AbsorbedCall("bf16", 576, True, 512, shaped=shape)
        for shape in ("", "everything", "relative bias", "lists that count", "everything and heavy")
    ),
    AbsorbedCall("fp32", 576, True, 512),
    *(AttentionCall("fp32", width, False, shaped="lists") for width in WIDTHS),
    *(AttentionCall("bf16", width, False, shaped="intervals") for width in WIDTHS),
    AttentionCall("bf16", 64, False, shaped="lists that count"),
    *(AttentionCall("bf16", width, True, shaped="bool mask") for width in WIDTHS),
    *(AttentionCall("bf16", width, False, shaped="padding as bias") for width in WIDTHS),
    TangentCall("bf16", 128, False, shaped="lists"),
    *(TangentCall("bf16", width, True, shaped=shape) for width in WIDTHS for shape in ("", "everything")),
    *(PaddedTangentCall("bf16", width, True) for width in (40, 80)),
    *(TangentCall("fp32", width, True) for width in WIDTHS[:2]),
    *(AttentionCall("fp32", width, True, shaped=kind) for width in WIDTHS[:3] for kind in ("tf32", "tf32x3")),
    *(AttentionCall("fp32", width, True) for width in WIDTHS),
    *(AttentionCall("fp32", width, True, shaped="bias") for width in (64, 512)),
    *(
        StatisticsCall("bf16", width, True, shaped=shape)
        for width in WIDTHS
        for shape in ("", "everything", "bias", "lists")
    ),
    *(StatisticsCall("bf16", width, True, want=("mass", "entropy")) for width in (64, 128)),
    *(StatisticsCall("bf16", width, False, shaped="intervals") for width in (64, 256, 512)),
    StatisticsCall("bf16", 64, False, shaped="lists that count"),
    *(StatisticsCall("fp32", width, True) for width in WIDTHS),
    *(StatisticsCall("fp32", width, True, shaped=kind) for width in (64, 256) for kind in ("tf32", "tf32x3")),
    *(MLPCall("bf16", 1024, "gelu", fused=True, tokens=tokens) for tokens in (128, 1024, 8192)),
    *(MLPCall("bf16", 1024, "silu", gated=True, fused=True, tokens=tokens) for tokens in (128, 8192)),
    MLPCall("bf16", 1024, "gelu", fused=False),
    MLPCall("bf16", 1024, "silu", gated=True, fused=False),
    MLPCall("fp32", 1024, "gelu", fused=True),
    MLPCall("fp32", 1024, "silu", gated=True, fused=True),
    MLPCall("bf16", 1024, "silu", gated=True, fused=True, biases=False),
    MLPCall("bf16", 1024, "relu_squared", fused=True),
    MLPCall("bf16", 1024, "gelu", fused=True, save="int8"),
    *(MLPCall("bf16", 1024, "silu", gated=True, fused=fused, save="int8") for fused in (True, False)),
    MLPCall("bf16", 1024, "silu", gated=True, fused=True, packed="up_gate"),
    *(BranchCall("bf16", 512, "gelu", fused=True, norm=norm) for norm in ("rms", "layer")),
    *(
        BranchCall("bf16", 512, "silu", gated=True, fused=True, tokens=16384, norm=norm)
        for norm in ("rms", "layer")
    ),
    *(
        BranchCall("bf16", 1024, "gelu", fused=True, tokens=tokens, after="dropout residual")
        for tokens in (128, 1024, 8192)
    ),
    BranchCall("bf16", 1024, "gelu", fused=True, after="residual"),
    *(BranchCall(dtype, 1024, "gelu", fused=False, after="dropout residual") for dtype in ("bf16", "fp32")),
    *(
        WholeMLPCall(dtype, width, activation, gated)
        for dtype, width in (("bf16", 64), ("bf16", 128), ("bf16", 80), ("fp32", 64))
        for activation, gated in (("gelu", False), ("gelu", True))
    ),
    *(WholeMLPCall("bf16", width, "silu", gated=True) for width in (64, 128)),
    WholeMLPCall("bf16", 128, "gelu", gated=True, last=True),
    *(HeadsCall("bf16", width, width) for width in WIDTHS),
    HeadsCall("bf16", 128, 128, everything=False),
    HeadsCall("bf16", 128, 128, "interleaved"),
    HeadsCall("bf16", 80, 32),
    HeadsCall("fp32", 128, 128),
    *(NormCall("bf16", 2**power) for power in range(6, 16)),
    *(NormCall("fp32", 2**power) for power in (10, 13, 15)),
    *(NormCall("bf16", 2**power, centred=False) for power in (10, 13, 15)),
    NormCall("bf16", 111),
    LossCall("bf16", 4096),
    LossCall("bf16", 4096, "bias weights softcap smoothing"),
    LossCall("bf16", 4096, "bias weights softcap smoothing entropy"),
    LossCall("bf16", 1024, "bias weights softcap smoothing entropy probabilities"),
    *(LossCall("bf16", 1024, f"{more}probabilities", 2111) for more in ("", "softcap ", "bias smoothing ")),
    LossCall("bf16", 4096, "filter"),
    LossCall("bf16", 4096, "bias weights softcap entropy filter"),
    LossCall("fp32", 1024),
    LossCall("fp32", 1024, "bias weights softcap entropy filter"),
    LossCall("fp32", 1024, "bias weights softcap smoothing entropy"),
    LossCall("fp32", 1024, "bias weights softcap smoothing entropy probabilities"),
    *(
        CacheCall("bf16", width, queries, shaped=shaped)
        for width in (64, 128, 256)
        for queries in (1, 8, 512)
        for shaped in (False, True)
    ),
    *(CacheCall("fp32", width, queries) for width in (64, 128, 256) for queries in (1, 512)),
    *(CacheCall("bf16", 576, queries, value_dim=512) for queries in (1, 512)),
    CacheCall("bf16", 128, paged=False),
    *(
        CacheCall("bf16", width, queries, stored=stored)
        for width in (64, 128, 256)
        for queries in (1, 512)
        for stored in ("int8", "fp8")
    ),
    *(
        CacheCall("bf16", width, queries, shaped=True, stored="fp8", by_page=True)
        for width in (64, 128, 256)
        for queries in (1, 512)
    ),
    CacheCall("fp16", 128, stored="fp8"),
    *(CacheCall("fp32", width, queries, stored="int8") for width in (64, 128, 256) for queries in (1, 512)),
    *(CacheCall("bf16", 576, queries, value_dim=512, stored="int8") for queries in (1, 512)),
    *(
        CacheCall(dtype, 576, queries, value_dim=512, shaped=shaped, stored=stored, heads=16)
        for dtype, queries, shaped, stored in LATENT
    ),
)


def calls_for(target: Target) -> tuple[Call, ...]:
    """The calls to compile for this target."""
    return tuple(c for c in CALLS if target.backend == "cuda" or _is_on_amd(c))


def _is_on_amd(call: Call) -> bool:
    if isinstance(call, WholeMLPCall) and call.dtype == "fp32":
        return False  # its table has no rows for it
    elsewhere = isinstance(call, CacheCall | AbsorbedCall | UnevenCall)
    return not elsewhere and getattr(call, "shaped", "") not in NOT_ON_AMD
