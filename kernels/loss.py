"""Cross-entropy of the logits z = softcap(x W^T + b) / temperature, of which no more than a chunk exists.

x is (T, d): T tokens of width d; W (V, d): V classes; b (V,) or None.

    forward    logits_kernel          one tile of x W^T in registers; of each token and tile: the largest logit,
    the
                                      sum of exponentials, the token's own logit, and sums for smoothing and
                                      entropy -> partials, one line for each tile of classes; merged in a fixed
                                      order
    backward   for each chunk of classes, so many that their gradients fit into CHUNK bytes:
               logit_gradient_kernel  the same tile again -> dz of the chunk, in x's dtype
               library                dx += dz W (in float32), dW = dz^T x, db = sum of dz
    filtered   logit_gradient_kernel  also says of each tile whether it is kept, because a probability in it is not
                                      below a number or it holds a token's own class
               kept_product_kernel    dx and dW, from these tiles alone (Wijmans et al., Cut Your Losses in
                                      Large-Vocabulary Language Models, 2024, section 4.3)

Counted before it was written: in flop, a forward and a backward are four products as large as x W^T, 8 T V d; at
T = d = 4096, V = 128256 that is 17 Tflop. Writing and reading dz once moves 4 T V bytes in half precision, 2 GB:
0.5 ms at 4 TB/s, beside 6 ms for one product at 700 Tflop/s. To keep all in one kernel instead, dx and dW would
each need a kernel that computes the logits again (5 products) and d accumulators for each row, or atomics, which
have no fixed order. Chunks of classes, not of tokens: so each row of dW is one product over all tokens, and only
dx, which is small, is summed over chunks. No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .launch.loss import KEPT_PRODUCT, LOSS
from .mlp.problem import Size, linear_argument
from .mlp.products import block, grouped_tile, inner_tile, products, quarters, tile_count
from .tiles import LOG2_E, matrix

# Bytes of the gradients of logits that exist at a time.
CHUNK = 2**28


class Numbers(NamedTuple):
    """The cap, the inverse of the temperature, what smoothing leaves of a target, and what it spreads to a class;
    below which probability a tile is left out, None for none."""

    softcap: float
    inverse_temperature: float
    left: float
    even: float
    filter: float | None


class Loss(NamedTuple):
    """What is computed of logits.

    softcap: 0 for none. smoothing: the part that is spread over all `classes`, of which a process may hold some.
    target: (T, V) probabilities, or None for class indices. class_weight: (V,) in float32, or None. filter: tiles
    whose probabilities are all below it are left out of the gradients; 0 for none.
    """

    softcap: float
    temperature: float
    smoothing: float
    classes: int
    entropy: bool
    target: torch.Tensor | None
    class_weight: torch.Tensor | None
    filter: float = 0.0


@triton.jit
def tile_logits(total, bias, columns, inside, numbers, tile: tl.constexpr):
    """The logits of a part of a tile of x W^T, -inf beyond the last class; and tanh of the capped ones."""
    if bias is not None:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    bent = total
    if tile.CAPPED:
        # tanh(a) is 1 - 2 / (1 + exp(2 a)); exp may be infinite.
        bent = 1.0 - 2.0 / (1.0 + tl.exp2(total * (2.0 * LOG2_E) / numbers.softcap))
        total = bent * numbers.softcap
    return tl.where(inside[None, :], total * numbers.inverse_temperature, float("-inf")), bent


@triton.jit
def spread_weights(probabilities, class_weight, row, column, rows, inside, numbers, tile: tl.constexpr):
    """The weights in the loss of a part of a tile's logits, but for those of the tokens' own classes; 0 beyond."""
    mask = rows[:, None] & inside[None, :]
    weights = tl.where(mask, numbers.even, 0.0)
    if tile.PROBABILITIES:
        pointers = block(probabilities, row, column, tile.BLOCK_M, tile.BLOCK_N // 4)
        weights += tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * numbers.left
    if class_weight is not None:
        columns = column + tl.arange(0, tile.BLOCK_N // 4)
        weights *= tl.load(class_weight + columns, mask=inside, other=0.0)[None, :]
    return weights


@triton.jit
def moved(weight, lowered):
    """weight * lowered; 0 where nothing was weighted yet, and the pivot has come from -inf."""
    return weight * tl.where(weight == 0.0, 0.0, lowered)


@triton.jit
def store_line(partials, line, value, tile_column, column_tiles, row, tokens):
    """Write one value of each row: to `partials` (lines, column_tiles, tokens)."""
    rows = row + tl.arange(0, value.shape[0])
    base = (tl.cast(line, tl.int64) * column_tiles + tile_column) * tokens
    tl.store(partials + base + rows, value, mask=rows < tokens)


@triton.jit
def logits_kernel(x, w, own, probabilities, class_weight, partials, size, numbers, tile: tl.constexpr):
    """What merges to the rows, of one tile of logits.

    Lines of partials: the largest logit m; the sum of exp(z - m); the logit of a token's own class, 0 if it is not
    here; if SPREAD, the sum of q (z - m) and of q; if ENTROPY, the sum of exp(z - m) (z - m).
    """
    column_tiles = tl.cdiv(size.hidden, tile.BLOCK_N)
    tile_row, tile_column = grouped_tile(tl.program_id(0), tl.cdiv(size.tokens, tile.BLOCK_M), column_tiles)
    row = tile_row * tile.BLOCK_M
    start = tile_column * tile.BLOCK_N
    total, _ = products(x, w.weight, None, row, start, size, tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, tile.WHOLE)
    parts = quarters(total)
    rows = row + tl.arange(0, tile.BLOCK_M)
    exists = rows < size.tokens
    own_column = tl.full((tile.BLOCK_M,), -1, tl.int32)
    if not tile.PROBABILITIES:
        own_column = tl.load(own + rows, mask=exists, other=-1)
    largest = tl.full((tile.BLOCK_M,), float("-inf"), tl.float32)
    sum_exp = tl.zeros((tile.BLOCK_M,), tl.float32)
    own_logit = tl.zeros((tile.BLOCK_M,), tl.float32)
    spread = tl.zeros((tile.BLOCK_M,), tl.float32)
    weight = tl.zeros((tile.BLOCK_M,), tl.float32)
    moment = tl.zeros((tile.BLOCK_M,), tl.float32)
    for part in tl.static_range(4):
        column = start + part * (tile.BLOCK_N // 4)
        columns = column + tl.arange(0, tile.BLOCK_N // 4)
        inside = columns < size.hidden
        z, _ = tile_logits(parts[part], w.bias, columns, inside, numbers, tile)
        if not tile.PROBABILITIES:
            own_logit += tl.sum(tl.where(columns[None, :] == own_column[:, None], z, 0.0), 1)
        new = tl.maximum(largest, tl.max(z, 1))
        # A row that has seen only -inf has maximum -inf. Use 0 as its pivot: -inf minus -inf is NaN.
        pivot = tl.where(new == float("-inf"), 0.0, new)
        lowered = largest - pivot
        z -= pivot[:, None]
        exponentials = tl.exp2(z * LOG2_E)
        rescale = tl.exp2(lowered * LOG2_E)
        if tile.SPREAD:
            q = spread_weights(probabilities, class_weight, row, column, exists, inside, numbers, tile)
            spread += moved(weight, lowered) + tl.sum(tl.where(q == 0.0, 0.0, q * z), 1)
            weight += tl.sum(q, 1)
        if tile.ENTROPY:
            moment = rescale * (moment + moved(sum_exp, lowered))
            moment += tl.sum(tl.where(exponentials == 0.0, 0.0, exponentials * z), 1)
        sum_exp = sum_exp * rescale + tl.sum(exponentials, 1)
        largest = new
    store_line(partials, 0, largest, tile_column, column_tiles, row, size.tokens)
    store_line(partials, 1, sum_exp, tile_column, column_tiles, row, size.tokens)
    store_line(partials, 2, own_logit, tile_column, column_tiles, row, size.tokens)
    if tile.SPREAD:
        store_line(partials, 3, spread, tile_column, column_tiles, row, size.tokens)
        store_line(partials, 4, weight, tile_column, column_tiles, row, size.tokens)
    if tile.ENTROPY:
        store_line(partials, 5, moment, tile_column, column_tiles, row, size.tokens)


@triton.jit
def load_line(values, line, rows, tokens):
    """One value of each row, from `values` (lines, tokens)."""
    return tl.load(values + tl.cast(line, tl.int64) * tokens + rows, mask=rows < tokens, other=0.0)


@triton.jit
def logit_gradient_kernel(
    x, w, own, probabilities, class_weight, values, dz, flags, size, numbers, tile: tl.constexpr
):
    """The gradient of one tile of x W^T + b, from `values` (lines, T) in float32: the pivot; log_total; the
    gradients of log_total and of the picked logits; a token's own class's weight; if ENTROPY, the entropy and its
    gradient. If FILTER, `flags` (column tiles, row tiles x BLOCK_M) are 1 for a row for which its tile is kept,
    else 0."""
    tile_row, tile_column = grouped_tile(
        tl.program_id(0), tl.cdiv(size.tokens, tile.BLOCK_M), tl.cdiv(size.hidden, tile.BLOCK_N)
    )
    row = tile_row * tile.BLOCK_M
    start = tile_column * tile.BLOCK_N
    total, _ = products(x, w.weight, None, row, start, size, tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, tile.WHOLE)
    parts = quarters(total)
    rows = row + tl.arange(0, tile.BLOCK_M)
    exists = rows < size.tokens
    pivot = load_line(values, 0, rows, size.tokens)
    log_total = load_line(values, 1, rows, size.tokens)
    dlog_total = load_line(values, 2, rows, size.tokens)
    dpicked = load_line(values, 3, rows, size.tokens)
    kept = tl.zeros((tile.BLOCK_M,), tl.int32)
    if tile.FILTER:
        own_column = tl.load(own + rows, mask=exists, other=-1)
        kept = ((own_column >= start) & (own_column < start + tile.BLOCK_N)).to(tl.int32)
    for part in tl.static_range(4):
        column = start + part * (tile.BLOCK_N // 4)
        columns = column + tl.arange(0, tile.BLOCK_N // 4)
        inside = columns < size.hidden
        z, bent = tile_logits(parts[part], w.bias, columns, inside, numbers, tile)
        z -= pivot[:, None]
        p = tl.exp2((z - log_total[:, None]) * LOG2_E)
        if tile.FILTER:  # A NaN is not below.
            counts = tl.where((p < numbers.filter) | ~(exists[:, None] & inside[None, :]), 0, 1)
            kept = tl.maximum(kept, tl.max(counts, 1))
        gradient = p * dlog_total[:, None]
        if tile.ENTROPY:
            mean = log_total - load_line(values, 5, rows, size.tokens)
            dentropy = load_line(values, 6, rows, size.tokens)
            gradient -= tl.where(p == 0.0, 0.0, p * (z - mean[:, None])) * dentropy[:, None]
        if not tile.PROBABILITIES:
            own_column = tl.load(own + rows, mask=exists, other=-1)
            share = load_line(values, 4, rows, size.tokens)
            match = columns[None, :] == own_column[:, None]
            gradient += tl.where(match, (dpicked * share)[:, None], 0.0)
        if tile.SPREAD:
            q = spread_weights(probabilities, class_weight, row, column, exists, inside, numbers, tile)
            gradient += q * dpicked[:, None]
        if tile.CAPPED:
            gradient *= 1.0 - bent * bent
        gradient *= numbers.inverse_temperature
        mask = exists[:, None] & inside[None, :]
        pointers = block(dz, row, column, tile.BLOCK_M, tile.BLOCK_N // 4)
        tl.store(pointers, gradient.to(dz.pointer.dtype.element_ty), mask=mask)
    if tile.FILTER:
        # Of each row: Triton 3.7 finds no layout in tensor memory for a maximum over both dimensions.
        lines = tl.cdiv(size.tokens, tile.BLOCK_M) * tile.BLOCK_M
        tl.store(flags + tl.cast(tile_column, tl.int64) * lines + rows, kept)


@triton.jit
def kept_product_kernel(a, b, steps, counts, out, size, tile: tl.constexpr):
    """One tile of a @ b. The summed dimension is visited in steps of STEP, PARTS times BLOCK_K: `steps` has for
    each row of tiles the numbers of the steps that are kept, then the others, and `counts` how many are kept. If
    ADD, `out` is added."""
    tile_row, tile_column = grouped_tile(
        tl.program_id(0), tl.cdiv(size.tokens, tile.BLOCK_M), tl.cdiv(size.hidden, tile.BLOCK_N)
    )
    row = tile_row * tile.BLOCK_M
    column = tile_column * tile.BLOCK_N
    rows = (row + tl.arange(0, tile.BLOCK_M) < size.tokens)[:, None]
    columns = (column + tl.arange(0, tile.BLOCK_N) < size.hidden)[None, :]
    inner = tl.arange(0, tile.BLOCK_K)
    total = tl.zeros((tile.BLOCK_M, tile.BLOCK_N), tl.float32)
    first = steps + tile_row * tl.cdiv(size.inner, tile.STEP)
    for i in range(tl.load(counts + tile_row) * tile.PARTS):
        number = i // tile.PARTS
        start = tl.load(first + number) * tile.STEP + (i - number * tile.PARTS) * tile.BLOCK_K
        inside = inner < size.inner - start
        left = tl.load(block(a, row, start, tile.BLOCK_M, tile.BLOCK_K), mask=rows & inside[None, :], other=0.0)
        right = tl.load(
            block(b, start, column, tile.BLOCK_K, tile.BLOCK_N), mask=columns & inside[:, None], other=0.0
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    pointers = block(out, row, column, tile.BLOCK_M, tile.BLOCK_N)
    if tile.ADD:
        total += tl.load(pointers, mask=rows & columns, other=0.0)
    tl.store(pointers, total.to(out.pointer.dtype.element_ty), mask=rows & columns)


def spreads(loss: Loss) -> bool:
    """Whether logits of classes other than a token's own have a weight in its loss."""
    return loss.target is not None or loss.smoothing > 0


def filters(loss: Loss) -> bool:
    """Whether tiles may be left out of the gradients: if a logit of any class has a weight, none may."""
    return loss.filter > 0 and not spreads(loss)


def tiling(kernel: object, x: torch.Tensor, loss: Loss) -> launch.Tiling:
    """The table's row. An entropy and smoothing at once need more registers, and so do narrow loads."""
    kind = "heavy" if loss.entropy and spreads(loss) else "plain"
    variants = ("unaligned",) if loss.target is not None and loss.target.stride(0) % 16 else ()
    return launch.look_up(LOSS, launch.family(kernel, x.device), x.element_size(), 0, kind, variants)


def launch_choices(x: torch.Tensor, loss: Loss, kernel: object, size: Size) -> dict:
    """The launch keywords of both kernels, beside the number of programs."""
    tile, step = tiling(kernel, x, loss), inner_tile(x.dtype)
    choices = tile.tile(
        BLOCK_K=step,
        WHOLE=size.inner % step == 0,
        CAPPED=loss.softcap > 0,
        PROBABILITIES=loss.target is not None,
        SPREAD=spreads(loss),
        ENTROPY=loss.entropy,
        FILTER=filters(loss),
    )
    return {"tile": choices, **tile.compiler_options()}


def numbers_of(loss: Loss) -> Numbers:
    even, least = loss.smoothing / loss.classes, loss.filter if filters(loss) else None
    return Numbers(loss.softcap, 1 / loss.temperature, 1 - loss.smoothing, even, least)


def loss_partials(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, own: torch.Tensor | None, loss: Loss
) -> torch.Tensor:
    """What `logits_kernel` writes of each token and each tile of classes: (6, tiles, T). Lines that are not asked
    for have no meaning."""
    size = Size(*x.shape, w.shape[0])
    with launch.on_device(x):
        tile = tiling(logits_kernel, x, loss)
        partials = x.new_empty((6, triton.cdiv(size.hidden, tile.block_n), size.tokens), dtype=torch.float32)
        if size.tokens > 0:
            launch.start(
                logits_kernel,
                (tile_count(size, tile),),
                matrix(x),
                linear_argument(w, b),
                own,
                None if loss.target is None else matrix(loss.target),
                loss.class_weight,
                partials,
                size,
                numbers_of(loss),
                **launch_choices(x, loss, logits_kernel, size),
            )
    return partials


def logit_gradients(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    own: torch.Tensor | None,
    values: torch.Tensor,
    dz: torch.Tensor,
    loss: Loss,
) -> torch.Tensor | None:
    """Fill dz (T, classes), contiguous, by `logit_gradient_kernel`; w, b, loss.target and loss.class_weight are of
    these classes. Returns which tiles (down, along) are kept if there is a filter."""
    size = Size(*x.shape, w.shape[0])
    with launch.on_device(x):
        tile, flags = tiling(logit_gradient_kernel, x, loss), None
        if filters(loss):
            sides = triton.cdiv(size.hidden, tile.block_n), triton.cdiv(size.tokens, tile.block_m), tile.block_m
            flags = torch.empty(sides, dtype=torch.int32, device=x.device)
        launch.start(
            logit_gradient_kernel,
            (tile_count(size, tile),),
            matrix(x),
            linear_argument(w, b),
            own,
            None if loss.target is None else matrix(loss.target),
            loss.class_weight,
            values,
            matrix(dz),
            flags,
            size,
            numbers_of(loss),
            **launch_choices(x, loss, logit_gradient_kernel, size),
        )
    return None if flags is None else flags.amax(2).t().contiguous()


def kept_product(
    a: torch.Tensor, b: torch.Tensor, flags: torch.Tensor, tile: launch.Tiling, out: torch.Tensor, add: bool
) -> None:
    """a @ b into `out`, or added to it, from the tiles of a that `flags` mark. These tiles have the sides of
    `tile`."""
    size = Size(*a.shape, b.shape[1])
    # A stable sort: the same tiles give the same sum.
    steps = torch.sort(flags, dim=1, descending=True, stable=True).indices.to(torch.int32)
    counts = flags.sum(1, dtype=torch.int32)
    with launch.on_device(a):
        row = launch.look_up(KEPT_PRODUCT, launch.family(kept_product_kernel, a.device), a.element_size(), 0)
        row = row._replace(block_m=tile.block_m)
        inner = min(inner_tile(a.dtype), tile.block_n)
        launch.start(
            kept_product_kernel,
            (tile_count(size, row),),
            matrix(a),
            matrix(b),
            steps,
            counts,
            matrix(out),
            size,
            tile=row.tile(BLOCK_K=inner, STEP=tile.block_n, PARTS=tile.block_n // inner, ADD=add),
            **row.compiler_options(),
        )


def own_columns(target: torch.Tensor, first: int, classes: int) -> torch.Tensor:
    """Of each token the column of its class among `classes` from `first` on, -1 if it is not among them."""
    column = target - first
    return torch.where((column >= 0) & (column < classes), column, -1).to(torch.int32)


def loss_rows(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, column: torch.Tensor | None, loss: Loss
) -> tuple[torch.Tensor, ...]:
    """log_total, own logit less the largest, spread logits, largest (T,), and the entropy or None.

    column: (T,), of the token's own class in W, -1 if it is not there; None for probabilities.
    """
    largest, sum_exp, own, spread, weight, moment = loss_partials(x, w, b, column, loss)
    top = largest.amax(0)
    pivot = top.clamp(min=torch.finfo(torch.float32).min)
    lowered = largest.clamp(min=torch.finfo(torch.float32).min) - pivot
    rescale = lowered.exp()
    total = (sum_exp * rescale).sum(0)
    log_total = total.log()
    spread_logits = torch.zeros_like(top)
    if spreads(loss):
        spread_logits = (spread + torch.where(weight == 0, 0.0, weight * lowered)).sum(0)
    entropy = None
    if loss.entropy:
        moment = rescale * (moment + torch.where(sum_exp == 0, 0.0, sum_exp * lowered))
        entropy = torch.where(total == 0, 0.0, log_total - moment.sum(0) / total)
    return log_total, own.sum(0) - top, spread_logits, top, entropy


def loss_gradients(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    column: torch.Tensor | None,
    values: torch.Tensor,
    loss: Loss,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """dx, dw and db, where they are wanted, some classes at a time. `values`: as of `logit_gradient_kernel`."""
    tokens, classes = x.shape[0], w.shape[0]
    dx = torch.zeros_like(x, dtype=torch.float32) if wanted[0] else None
    dw = torch.empty_like(w, memory_format=torch.contiguous_format) if wanted[1] else None
    db = torch.zeros_like(w[:, 0]) if wanted[2] else None
    if tokens == 0:
        return None if dx is None else dx.to(x.dtype), None if dw is None else dw.zero_(), db
    # Whole tiles of any table, so that no chunk ends within one.
    step = max(256, CHUNK // (tokens * x.element_size()) // 256 * 256)
    memory = x.new_empty(tokens * min(step, classes))
    for start in range(0, classes, step):
        some = slice(start, min(start + step, classes))
        dz = memory[: tokens * (some.stop - start)].view(tokens, -1)
        part = loss._replace(
            target=None if loss.target is None else loss.target[:, some],
            class_weight=None if loss.class_weight is None else loss.class_weight[some],
        )
        own = None if column is None else own_columns(column, start, some.stop - start)
        flags = logit_gradients(x, w[some], None if b is None else b[some], own, values, dz, part)
        tile = tiling(logit_gradient_kernel, x, loss)
        if dx is not None and flags is not None:
            kept_product(dz, w[some], flags, tile, dx, add=True)
        elif dx is not None:
            dx += product_in_float32(dz, w[some])
        if dw is not None and flags is not None:
            turned = tile._replace(block_m=tile.block_n, block_n=tile.block_m)
            kept_product(dz.t(), x, flags.t().contiguous(), turned, dw[some], add=False)
        elif dw is not None:
            torch.mm(dz.t(), x, out=dw[some])
        if db is not None:
            db[some] = dz.sum(0, dtype=torch.float32).to(db.dtype)
    return None if dx is None else dx.to(x.dtype), dw, db


def product_in_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, not rounded to their dtype."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
