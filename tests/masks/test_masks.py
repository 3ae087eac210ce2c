"""Masks: every expression of the algebra is lowered to lists that mean exactly the same, at low cost."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from fastattn import masks
from fastattn.masks import BlockLists, Lowered, Mask, algebra, decode, lowering
from fastattn.masks.lowering import distinct_rows

LONG = 131072


# Definitions of the kinds, written without positions: by slices, loops and repetition.


def dense_window(shape: tuple, left: int | None, right: int | None) -> Tensor:
    queries, keys = shape[2:]
    seen = torch.ones(queries, keys, dtype=torch.bool)
    seen = seen if right is None else seen.tril(keys - queries + right)
    return seen if left is None else seen.triu(keys - queries - left)


def dense_lengths(shape: tuple, lengths: list[int]) -> Tensor:
    seen = torch.zeros(shape[0], 1, *shape[2:], dtype=torch.bool)
    for element in range(shape[0]):
        seen[element, :, :, : max(0, lengths[element % len(lengths)])] = True
    return seen


def dense_documents(shape: tuple, ids: list[list[int]]) -> Tensor:
    queries, keys = shape[2:]
    seen = torch.zeros(len(ids), 1, keys, keys, dtype=torch.bool)
    for element, row in enumerate(ids):
        for document in set(row):
            member = torch.tensor([own == document for own in row])
            seen[element, 0, member] |= member
    return seen[:, :, keys - queries :]


def dense_packed(shape: tuple, starts: list[int], key_starts: list[int], left, right) -> Tensor:
    seen = torch.zeros(shape[2:], dtype=torch.bool)
    for s in range(len(starts) - 1):
        rows, columns = slice(*starts[s : s + 2]), slice(*key_starts[s : s + 2])
        own = (1, 1, rows.stop - rows.start, columns.stop - columns.start)
        seen[rows, columns] = dense_window(own, left, right)
    return seen


def dense_global(shape: tuple, positions: list[int]) -> Tensor:
    queries, keys = shape[2:]
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for position in positions:
        seen[:, position] = True
        if position >= keys - queries:
            seen[position - (keys - queries)] = True
    return seen


def dense_dilated(shape: tuple, step: int) -> Tensor:
    queries, keys = shape[2:]
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for query in range(queries):
        seen[query, (query + keys - queries) % step :: step] = True
    return seen


def dense_blocks(shape: tuple, grid: Tensor, block: int) -> Tensor:
    seen = grid.repeat_interleave(block, -2).repeat_interleave(block, -1)
    return seen[..., : shape[2], : shape[3]]


def some_predicate(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (3 * query + key * key + 5 * head + batch) % 7 < 3


def dense_predicate(shape: tuple) -> Tensor:
    pairs = [torch.arange(n).view([-1 if i == d else 1 for i in range(4)]) for d, n in enumerate(shape)]
    return (3 * pairs[2] + pairs[3] ** 2 + 5 * pairs[1] + pairs[0]) % 7 < 3


KINDS = (
    *("causal", "window", "lengths", "prefix", "documents", "cu_seqlens"),
    "packed",
    *("global", "flags", "dilated", "blocks", "function", "dense"),
)
LENGTHS = (1, 40, 64, 65, 128, 150, 200)
SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from(LENGTHS), st.sampled_from(LENGTHS))


@st.composite
def kinds(draw: st.DrawFn, shape: tuple) -> tuple[Mask, Tensor]:
    """A mask of one kind, and what it is to see."""
    batch, heads, queries, keys = shape
    maybe = st.none() | st.integers(0, 250)
    kind = draw(st.sampled_from(KINDS))
    if kind in ("documents", "cu_seqlens") and queries > keys:
        kind = "causal"
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    if kind == "causal":
        return masks.causal(), dense_window(shape, None, 0)
    if kind == "window":
        left, right = draw(maybe), draw(maybe)
        return masks.window(left, right), dense_window(shape, left, right)
    if kind == "lengths":
        lengths = draw(st.lists(st.integers(-5, 250), min_size=batch, max_size=batch))
        return masks.key_lengths(lengths), dense_lengths(shape, lengths)
    if kind == "prefix":
        length = draw(st.integers(0, 250))
        return masks.prefix(length), dense_lengths(shape, [length])
    if kind == "documents":
        ids = torch.randint(0, 4, (draw(st.sampled_from((1, batch))), keys), generator=random)
        ids = ids.sort().values if draw(st.booleans()) else ids
        return masks.documents(ids), dense_documents(shape, ids.tolist())
    if kind == "cu_seqlens":
        cuts = sorted(draw(st.lists(st.integers(0, keys), max_size=4)))
        ids = [sum(cut <= key for cut in cuts) for key in range(keys)]
        return masks.documents(cu_seqlens=[0, *cuts, keys]), dense_documents(shape, [ids])
    if kind == "packed":
        sequences = draw(st.integers(1, 5))
        cuts = [
            [0, *sorted(draw(st.lists(st.integers(0, n), min_size=sequences - 1, max_size=sequences - 1))), n]
            for n in (queries, keys)
        ]
        causal, bounds = draw(st.booleans()), (draw(maybe), draw(maybe))
        mask = masks.packed_sequences(*cuts, causal=causal, window=bounds)
        return mask, dense_packed(shape, *cuts, bounds[0], 0 if causal else bounds[1])
    if kind == "global":
        positions = draw(st.lists(st.integers(0, keys - 1), max_size=4))
        return masks.global_tokens(positions), dense_global(shape, positions)
    if kind == "flags":
        flags = torch.rand(batch, keys, generator=random) < draw(st.sampled_from((0.02, 0.5, 1.0)))
        return masks.global_tokens(flags), torch.stack(
            [dense_global(shape, row.nonzero()[:, 0].tolist()) for row in flags]
        )[:, None]
    if kind == "dilated":
        step = draw(st.integers(1, 130))
        return masks.dilated(step), dense_dilated(shape, step)
    if kind == "blocks":
        block = draw(st.sampled_from((1, 16, 48, 64, 100, 128)))
        front = draw(st.sampled_from(((), (1, heads), (batch, 1), (batch, heads), (heads,))))
        grid = torch.rand(*front, -(-queries // block), -(-keys // block), generator=random) < 0.5
        return masks.blocks(grid, block), dense_blocks(shape, grid, block)
    if kind == "function":
        return masks.from_function(some_predicate), dense_predicate(shape)
    front = draw(st.sampled_from(((), (1, heads), (batch, 1), (batch, heads))))
    seen = torch.rand(*front, queries, keys, generator=random) < draw(st.sampled_from((0.0, 0.5, 1.0)))
    return masks.from_dense(seen), seen


@st.composite
def expressions(draw: st.DrawFn, shape: tuple, depth: int = 3) -> tuple[Mask, Tensor]:
    operator = draw(st.sampled_from("&|~.")) if depth else "."
    if operator == ".":
        return draw(kinds(shape))
    mask, seen = draw(expressions(shape, depth - 1))
    if operator == "~":
        return ~mask, ~seen
    other, other_seen = draw(expressions(shape, depth - 1))
    return (mask & other, seen & other_seen) if operator == "&" else (mask | other, seen | other_seen)


@given(st.data())
@settings(max_examples=200)
def test_every_expression_is_lowered_to_lists_that_decode_to_its_definition(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    mask, seen = data.draw(expressions(shape))
    seen = seen.expand(shape)
    assert torch.equal(mask.dense(*shape).expand(shape), seen)
    lists = mask.lower(*shape, closed_forms=False).lists
    assert lists is not None and lists.full_counts is None and lists.column_partial_counts is None
    for by in ("rows", "columns"):
        decoded, bias = decode(lists, *shape, by=by)
        assert torch.equal(decoded, seen)
        assert (bias == torch.where(seen, 0.0, -math.inf)).all(), "a pair is listed twice"
    assert_well_formed(lists)
    lowered = mask.lower(*shape)
    assert lowered.visible == int(seen.sum())
    granules = torch.nn.functional.pad(seen, (0, -shape[3] % 64, 0, -shape[2] % 64))
    granules = granules.unflatten(3, (-1, 64)).unflatten(2, (-1, 64)).any(5).any(3)
    where = mask._shape(*shape, "cpu")
    assert torch.equal(lowering.visited_by_row(mask, where), granules.sum((0, 1, 3)))
    assert torch.equal(algebra.visited_by_row(mask, where), lowered.visited_by_row)
    if lowered.intervals is None:
        assert lowered.visited_granules == int(granules.sum())
    else:
        assert lowered.visited_granules >= int(granules.sum())
        for whose in (seen, seen.mT):
            # The keys of each query, then the queries of each key.
            start, stop = lowered.intervals.split(shape[2:], 2)[0 if whose is seen else 1][
                :, None, :, :, None
            ].unbind(2)
            other = torch.arange(whose.shape[3])
            assert torch.equal(((start <= other) & (other < stop)).expand(whose.shape), whose)
    if lowered.is_window:
        window = dense_window(shape, lowered.left, lowered.right)
        lengths = [shape[3]] if lowered.key_lengths is None else lowered.key_lengths.tolist()
        assert torch.equal((window & dense_lengths(shape, lengths)).expand(shape), seen)


@st.composite
def bigbirds(draw: st.DrawFn, shape: tuple) -> Mask:
    """Of sequences that have as many queries as keys; in the style of huggingface multiples of the block."""
    block, random = draw(st.sampled_from((16, 48, 64, 100))), draw(st.integers(0, 3))
    if draw(st.booleans()) and shape[2] % block == 0:
        training = draw(st.booleans())
        return masks.bigbird(block, random, style="huggingface", seed=draw(st.integers(0, 3)), training=training)
    edges, seed = draw(st.integers(0, 2)), draw(st.integers(0, 9))
    return masks.bigbird(
        block, random, global_blocks=edges, window_blocks=3, seed=seed, per_head=draw(st.booleans())
    )


def assert_larger_blocks_first_change_nothing(mask: Mask, shape: tuple, slab: int, zoom: int) -> None:
    where = mask._shape(*shape, "cpu")
    expected = lowering.build_lists(mask, where)
    with mock.patch.multiple(lowering, SLAB=slab, ZOOM=zoom, WORDS=3, LOOK=2):
        found = lowering.build_lists(mask, where)
        visited = lowering.visited_by_row(mask, where)
    assert torch.equal(decode(found, *shape)[0], mask.dense(*shape).expand(shape))
    if not mask.repeats:
        assert_well_formed(found)
        assert torch.equal(visited, Lowered(where, lists=expected).visited_by_row)
    # Tiles may be numbered in another order.
    for name in ("partial_tiles", "column_partial_tiles"):
        assert torch.equal(*(lists.bit_tiles[getattr(lists, name).long()] for lists in (found, expected)))
    for name, t in found._asdict().items():
        if t is not None and "tiles" not in name:
            assert torch.equal(t, getattr(expected, name)), name


@pytest.mark.parametrize(("slab", "zoom"), [(1, 2), (10, 4)])
@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(),
        masks.window(100, 70) | masks.global_tokens([3, 400]),
        masks.causal() & masks.dilated(70),
        ~masks.documents(torch.arange(900) // 210),
        masks.documents(torch.arange(900) // 40 % 3),
        masks.packed_sequences([0, 333, 500, 900], [0, 300, 480, 900], causal=True) | masks.window(0, 0),
        masks.key_lengths([300]) | masks.from_function(some_predicate) & masks.window(90, 0),
        masks.blocks(torch.eye(9, dtype=torch.bool), 100) | masks.causal(),
        masks.blocks(torch.arange(57 * 57).view(57, 57) % 7 == 0, 16),
        masks.bigbird(16, 1, seed=1),
        masks.bigbird(31, 0),  # the last block has one token
        masks.bigbird(48, 2, global_blocks=0, window_blocks=5, per_head=True),
        masks.from_dense(torch.arange(900)[:, None] // 130 >= torch.arange(900) // 170),
    ],
    ids=repr,
)
def test_looking_at_larger_blocks_first_gives_the_same_lists(mask: Mask, slab: int, zoom: int) -> None:
    assert_larger_blocks_first_change_nothing(mask, (1, 2, 900, 900), slab, zoom)


@given(st.data(), st.sampled_from((1, 10)), st.sampled_from((2, 4)))
@settings(max_examples=40)
def test_looking_at_larger_blocks_first_gives_the_same_lists_of_any_mask(data, slab: int, zoom: int) -> None:
    shape = (1, 2, *[data.draw(st.sampled_from((256, 333, 401)))] * 2)
    mask = data.draw(bigbirds(shape) | expressions(shape, 2).map(lambda pair: pair[0]))
    assert_larger_blocks_first_change_nothing(mask, shape, slab, zoom)


def test_of_half_a_million_tokens_few_granules_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, states = 0, algebra.Or.states

    def counted(self: Mask, slab: lowering.Slab) -> Tensor:
        nonlocal looked
        found = states(self, slab)
        looked += found.numel()
        return found

    monkeypatch.setattr(algebra.Or, "states", counted)
    mask = masks.window(512, 512) | masks.bigbird(48)
    visited = int(algebra.visited_by_row(mask, mask._shape(1, 1, 2**19, 2**19, "cpu")).sum())
    assert looked < 10 * visited < 2**26 / 20  # of 2**26 granules


def assert_well_formed(lists: BlockLists) -> None:
    """Columns and rows ascend within a list, tiles are neither empty nor full nor equal, nor are patterns."""
    for offsets, others in (
        (lists.full_offsets, lists.full_columns),
        (lists.partial_offsets, lists.partial_columns),
        (lists.column_full_offsets, lists.column_full_rows),
        (lists.column_partial_offsets, lists.column_partial_rows),
    ):
        assert offsets.dtype == others.dtype == torch.int32
        assert offsets.flatten()[0] == 0 and offsets.flatten()[-1] == len(others)
        assert torch.equal(offsets[1:, 0], offsets[:-1, -1])
        for begin, end in zip(offsets[:, :-1].flatten().tolist(), offsets[:, 1:].flatten().tolist(), strict=True):
            assert (others[begin:end].diff() > 0).all()
    tiles = lists.bit_tiles
    assert tiles.dtype == torch.int64 and len(tiles.unique(dim=0)) == len(tiles)
    assert (tiles != 0).any(1).all() and (tiles != -1).any(1).all()
    assert set(lists.partial_tiles.tolist()) == set(range(len(tiles)))
    assert set(lists.pattern.flatten().tolist()) == set(range(len(lists.full_offsets)))


def flex_window(batch, head, query, key):
    return (query >= key) & (query - key <= 100)


def flex_documents(batch, head, query, key):
    return query // 150 == key // 150


def flex_prefix(batch, head, query, key):
    return (key <= query) | (key < 90 + 60 * batch)


def flex_heads(batch, head, query, key):
    return (query - key) % (2 + head) == 0


@pytest.mark.parametrize(
    ("mask", "mask_mod"),
    [
        (masks.causal() & masks.window(100), flex_window),
        (masks.documents(torch.arange(384) // 150), flex_documents),
        (masks.causal() | masks.prefix([90, 150]), flex_prefix),
        (masks.from_function(flex_heads), flex_heads),
        (masks.dilated(1) & ~masks.from_function(flex_heads), lambda b, h, q, k: ~flex_heads(b, h, q, k)),
    ],
    ids=lambda value: repr(value) if isinstance(value, Mask) else "",
)
def test_masks_and_their_granules_are_those_of_flex_attention(mask: Mask, mask_mod: Callable) -> None:
    shape = (2, 2, 384, 384)
    assert torch.equal(mask.dense(*shape).expand(shape), create_mask(mask_mod, *shape, device="cpu"))
    theirs = create_block_mask(mask_mod, *shape, device="cpu", BLOCK_SIZE=64)
    ours = mask.lower(*shape, closed_forms=False).lists
    pattern = ours.pattern.expand(2, 2)
    for kind, numbers, indices in (
        ("partial", theirs.kv_num_blocks, theirs.kv_indices),
        ("full", theirs.full_kv_num_blocks, theirs.full_kv_indices),
    ):
        offsets, columns = getattr(ours, f"{kind}_offsets"), getattr(ours, f"{kind}_columns")
        for b, h, row in np.ndindex(2, 2, 6):
            begin, end = offsets[pattern[b, h], row : row + 2].tolist()
            assert columns[begin:end].tolist() == indices[b, h, row, : numbers[b, h, row]].tolist()


# BigBird


def test_paper_bigbird_is_the_union_of_window_edges_and_different_random_blocks() -> None:
    block, count, random = 32, 20, 3
    seen = masks.bigbird(block, random, per_head=True, seed=3).dense(1, 4, count * block, count * block)
    grid = seen[0, :, ::block, ::block]
    assert torch.equal(dense_blocks((1, 4, count * block, count * block), grid, block), seen[0])
    row, column = torch.arange(count)[:, None], torch.arange(count)
    fixed = ((row - column).abs() <= 1) | (row % (count - 1) == 0) | (column % (count - 1) == 0)
    assert grid[:, fixed].all()
    drawn = grid & ~fixed
    assert (drawn[:, 1:-1].sum(-1) == random).all()
    assert len({tuple(head.flatten().tolist()) for head in drawn}) == 4, "every head draws its own"
    assert drawn.any(0)[2:-2].sum(-1).float().mean() > 8, "from everywhere"


def test_paper_bigbird_draws_what_is_left_and_takes_any_length() -> None:
    assert masks.bigbird(16, 3).dense(1, 1, 75, 75).all(), "five blocks leave nothing hidden"
    assert masks.bigbird(64, 2, seed=1) == masks.bigbird(64, 2, seed=1)
    shape = (1, 1, 1000, 1000)
    first, second = (masks.bigbird(64, 2, seed=seed) for seed in (1, 2))
    assert not torch.equal(first.dense(*shape), second.dense(*shape))
    assert torch.equal(decode(first.lower(*shape).lists, *shape)[0], first.dense(*shape))


def huggingface_layer(heads: int, block: int, random: int, seed: int, *, training: bool):
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    config = BigBirdConfig(
        hidden_size=8 * heads, num_attention_heads=heads, block_size=block, num_random_blocks=random
    )
    return BigBirdBlockSparseAttention(config, seed).train(training)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("length", "block", "random"), [(208, 16, 3), (320, 16, 2), (1024, 64, 3), (1024, 32, 2)])
def test_huggingface_bigbird_is_a_dense_softmax_with_the_decoded_bias(
    length: int, block: int, random: int, training: bool
) -> None:
    from transformers.models.big_bird.modeling_big_bird import BigBirdModel

    layer = huggingface_layer(2, block, random, seed=4, training=training)
    x, lengths = torch.randn(2, length, 16), torch.tensor([length, length - block - 5])
    padding = (torch.arange(length) < lengths[:, None]).float()
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(padding, block)
    expected = layer(x, band, from_mask, to_mask, blocked, blocked)[0]

    mask = masks.bigbird(block, random, style="huggingface", seed=4, training=training)
    mask = mask & masks.key_lengths(lengths)
    shape = (2, 2, length, length)
    lists = mask.lower(*shape).lists
    seen, bias = decode(lists, *shape)
    assert torch.equal(bias, decode(lists, *shape, by="columns")[1])
    assert torch.equal(seen, mask.dense(*shape).expand(shape))
    q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (layer.query, layer.key, layer.value))
    out = ((q @ k.mT / math.sqrt(8) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out * from_mask.view(2, length, 1), expected, atol=2e-6, rtol=1e-5)


DRAWS = [(3072, 64, 3, 2), (4096, 128, 2, 1), (2048, 64, 3, 3), (1536, 64, 2, 2)]


@pytest.mark.parametrize(("length", "block", "random", "heads"), DRAWS)
def test_huggingface_bigbird_draws_the_same_blocks(length: int, block: int, random: int, heads: int) -> None:
    layer = huggingface_layer(heads, block, random, seed=7, training=True)
    np.random.seed(7)
    if length in (1024, 3072, 4096):
        tables = [layer._bigbird_block_rand_mask(4096, 4096, block, block, random, 1024) for _ in range(heads)]
    else:
        plan = layer._get_rand_attn_plan(length, block, random)
        tables = layer._bigbird_block_rand_mask_with_head(length, length, block, block, heads, *plan)
    count = length // block
    mask = masks.bigbird(block, random, style="huggingface", seed=7, training=True)
    _, bias = decode(mask.lower(1, heads, length, length).lists, 1, heads, length, length)
    times = bias[0, :, ::block, ::block].exp().round()
    row, column = torch.arange(count)[:, None], torch.arange(count)
    fixed = ((row - column).abs() <= 1) | (row % (count - 1) == 0) | (column % (count - 1) == 0)
    for head in range(heads):
        drawn = torch.zeros(count, count)
        rows = torch.arange(1, count - 1)[:, None].expand(-1, random)
        columns = torch.from_numpy(tables[head][: count - 2]).long()
        drawn.index_put_((rows, columns), torch.ones(()), accumulate=True)
        assert torch.equal(times[head], fixed + drawn)


def test_short_sequences_of_huggingface_bigbird_see_everything_once() -> None:
    mask = masks.bigbird(16, 3, style="huggingface")
    assert mask.dense(1, 1, 176, 176).all() and not mask.dense(1, 1, 192, 192).all()
    lists = mask.lower(1, 1, 176, 176).lists
    assert lists.full_counts is None and lists.partial_counts is None


@given(st.data())
@settings(max_examples=30)
def test_multiplicities_smaller_than_a_granule_are_kept(data: st.DataObject) -> None:
    block = data.draw(st.sampled_from((16, 48, 64, 128)))
    queries, keys, most = (data.draw(st.sampled_from(few)) for few in (LENGTHS, LENGTHS, (1, 3)))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    grid = torch.randint(0, most + 1, (2, -(-queries // block), -(-keys // block)), generator=random)
    shape = (1, 2, queries, keys)
    counts = dense_blocks(shape, grid, block)[None] * dense_window(shape, 70, None)
    lists = (masks.blocks(grid, block) & masks.window(70)).lower(*shape).lists
    for by in ("rows", "columns"):
        torch.testing.assert_close(decode(lists, *shape, by=by)[1], counts.float().log())


# Cost, counted


def thousand_documents() -> Mask:
    cuts = torch.randint(0, LONG, (999,), generator=torch.Generator().manual_seed(0)).sort().values
    return masks.documents(cu_seqlens=[0, *cuts.tolist(), LONG])


def thousand_sequences(**bounds) -> Mask:
    starts = [0, *torch.randint(0, LONG, (999,), generator=torch.Generator().manual_seed(1)).sort()[0].tolist()]
    return masks.packed_sequences([*starts, LONG], [*(s // 2 for s in starts), LONG], **bounds)


@pytest.mark.parametrize(
    ("mask", "megabytes"),
    [
        (masks.causal() & masks.window(512), 0.3),
        (thousand_documents(), 2),
        (masks.causal() & thousand_documents(), 1),
        (thousand_sequences(), 2),
        (thousand_sequences(causal=True), 2),
        (masks.bigbird(seed=11), 0.3),
        (masks.longformer(512, [0, 1]), 0.4),
        (masks.causal() & masks.window(4096) & masks.dilated(3), 2.5),
    ],
    ids=repr,
)
def test_structured_masks_of_131072_tokens_take_megabytes_at_most(mask: Mask, megabytes: float) -> None:
    with LargestTensor() as largest:
        lowered = mask.lower(1, 1, LONG, LONG, closed_forms=False)
    assert lowered.lists.nbytes < megabytes * 1e6
    assert largest.nbytes < 16e6
    assert lowered.visited_granules < 2.5 * lowered.ideal_granules or "dilated" in repr(mask)


def test_a_function_is_evaluated_a_few_megabytes_at_a_time() -> None:
    with LargestTensor() as largest:
        masks.from_function(lambda b, h, q, k: (q ^ k) % 1000 < 3).lower(1, 1, 3000, 3000)
    assert largest.nbytes < 3000 * 3000


PEAK = """
import resource, torch
from fastattn import masks
def build(length):
    masks.from_function(lambda b, h, q, k: (q ^ k) & 7 < 3).lower(1, 1, length, length)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(-build(512) + build(16384))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak of resident memory, in KiB")
def test_a_function_of_16384_tokens_is_lowered_in_a_quarter_of_its_dense_mask() -> None:
    command = [sys.executable, "-c", PEAK]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(result.stdout) * 1024 < 16384 * 16384 / 4


def test_closed_forms_take_no_lists() -> None:
    mask = masks.causal() & masks.window(512, 30) & masks.key_lengths([9000, 70, -1]) & masks.window(1000)
    lowered = (mask & masks.prefix(8000)).lower(3, 4, 5000, 8192)
    assert lowered.lists is None and (lowered.left, lowered.right) == (512, 0)
    assert lowered.key_lengths.dtype == torch.int32 and lowered.key_lengths.tolist() == [8000, 70, 0]
    assert masks.window(10**30, 8000).lower(1, 1, 64, 64).left is None
    assert masks.packed_sequences([0, 64], [0, 96], True).lower(1, 1, 64, 96).lists is None
    assert (masks.causal() | masks.dilated(3)).lower(1, 1, 64, 64).lists is not None


@given(SHAPES, *[st.none() | st.integers(0, 250)] * 2, st.lists(st.integers(-5, 250), min_size=2, max_size=2))
@settings(max_examples=60)
def test_closed_forms_count_what_their_lists_count(
    shape: tuple, left: int | None, right: int | None, lengths: list[int]
) -> None:
    mask = masks.window(left, right) & masks.key_lengths(lengths[: shape[0]])
    closed, listed = mask.lower(*shape), mask.lower(*shape, closed_forms=False)
    assert (closed.visible, closed.visited_granules) == (listed.visible, listed.visited_granules)


def test_equal_patterns_and_tiles_are_stored_once() -> None:
    grid = torch.rand(2, 1, 5, 5) < 0.5
    lists = masks.blocks(torch.cat([grid, grid[:1]])).lower(3, 8, 320, 320).lists
    assert lists.pattern.tolist() == [[0], [1], [0]] and lists.full_offsets.shape == (2, 6)
    assert len(masks.causal().lower(1, 1, 6400, 6400, closed_forms=False).lists.bit_tiles) == 1


def test_tiles_with_equal_hashes_stay_different(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.zeros(2, 64, dtype=torch.int64))
    rows = torch.zeros(3, 64, dtype=torch.int64)
    rows[0, :2], rows[1, :2], rows[2, :2] = torch.tensor([1, 2]), torch.tensor([2, 1]), torch.tensor([1, 2])
    tiles, numbers = distinct_rows(rows)
    assert torch.equal(tiles[numbers], rows) and len(tiles) == 2


# Intervals


def test_documents_and_prefixes_are_intervals_unless_they_lie_apart() -> None:
    ids = torch.tensor([[4] * 30 + [2] * 40, [1] * 70])
    lowered = (masks.documents(ids) & masks.causal() & masks.window(9)).lower(2, 3, 50, 70)
    assert lowered.lists is None and lowered.intervals.shape == (2, 2, 120)
    assert lowered.to("meta").intervals.is_meta
    assert (masks.causal() | masks.prefix([3, 9])).lower(2, 1, 70, 70).intervals is not None
    assert masks.documents(ids.flip(1).roll(5, 1)).lower(2, 3, 50, 70).lists is not None, "a document in two parts"
    backward = masks.causal() & ~masks.causal() | masks.from_function(some_predicate)
    assert backward.lower(1, 1, 70, 70).intervals is None
    # Both are intervals, but the second's come before the first's: no query's are one.
    assert (masks.window(0, 0) | masks.prefix(1)).lower(1, 1, 70, 70).lists is not None


# Shares


@given(st.data())
@settings(max_examples=50)
def test_shares_cover_every_entry_once_and_the_heaviest_come_first(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 2)), 2, *data.draw(st.tuples(*[st.sampled_from((0, 64, 900, 2000))] * 2)))
    by = data.draw(st.sampled_from(("rows", "columns")))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    grid = torch.rand(shape[0], 2, -(-shape[2] // 32), -(-shape[3] // 32), generator=random) < 0.05
    grid[:, :, :2] = grid[..., :1] = True
    lists = masks.blocks(grid, 32).lower(*shape, closed_forms=False).lists
    offsets, items, merges = (
        (lists.full_offsets + lists.partial_offsets, lists.row_items, lists.row_merges)
        if by == "rows"
        else (lists.column_full_offsets + lists.column_partial_offsets, lists.column_items, lists.column_merges)
    )
    sizes = offsets.diff().amax(0).tolist()
    longest = max(8, 2 * math.ceil(sum(sizes) / max(1, sum(size > 0 for size in sizes))))
    loads = [sizes[row] / shares for row, _, shares, _ in items.tolist()]
    assert loads == sorted(loads, reverse=True) and max(loads, default=0) <= longest
    slots = []
    for row, size in enumerate(sizes):
        own = sorted(item[1:] for item in items.tolist() if item[0] == row)
        count = max(1, math.ceil(size / longest))
        assert [share for share, _, _ in own] == list(range(count)) and {shares for _, shares, _ in own} == {count}
        slots += [[row, own[0][2], count]] if count > 1 else []
        assert [slot for _, _, slot in own] == ([own[0][2] + i for i in range(count)] if count > 1 else [-1])
    assert merges.tolist() == slots
    assert [slot for _, slot, _ in slots] == [sum(m[2] for m in slots[:i]) for i in range(len(slots))]


# Values


def test_masks_print_as_they_are_written() -> None:
    causal, window = masks.causal(), masks.window
    assert repr(causal & window(512)) == "causal & window(512)"
    assert repr((causal | masks.prefix(7)) & ~(window(None, 3) & window())) == (
        "(causal | prefix(7)) & ~(window(None, 3) & window())"
    )
    assert repr(masks.key_lengths([3, 5])) == "key_lengths([3, 5])"
    assert repr(masks.documents(torch.zeros(2, 4096, dtype=torch.int64))) == "documents(<2 x 4096>)"
    assert repr(masks.documents(cu_seqlens=[0, 5])) == "documents(cu_seqlens=[0, 5])"
    packed = masks.packed_sequences
    assert repr(packed([0, 5, 5], [0, 2, 9])) == "packed_sequences([0, 5, 5], [0, 2, 9])"
    assert repr(packed([0, 5], [0, 9], True, (3, None))) == (
        "packed_sequences([0, 5], [0, 9], causal=True, window=(3, None))"
    )
    assert repr(masks.longformer(8, [0])) == "window(4, 4) | global_tokens([0])"
    assert repr(masks.from_function(some_predicate)) == "from_function(some_predicate)"
    assert repr(masks.bigbird(seed=3)) == "bigbird(64, 3, seed=3)"
    assert repr(masks.bigbird(style="huggingface", training=True, seed=1)) == (
        "bigbird(64, 3, style='huggingface', seed=1, training=True)"
    )


def test_equal_masks_are_lowered_once_and_changed_tensors_again() -> None:
    def lower(mask: Mask):
        return mask.lower(2, 1, 100, 100, closed_forms=False)

    def mask() -> Mask:
        return masks.causal() & masks.key_lengths([50, 70]) | masks.global_tokens([3])

    assert mask() == mask() and hash(mask()) == hash(mask())
    assert lower(mask()) is lower(mask())
    assert lower(mask()) is not lower(masks.causal() & masks.key_lengths([50, 71]) | masks.global_tokens([3]))
    assert masks.causal() & masks.window(3) != masks.causal() | masks.window(3)
    assert masks.global_tokens([0, 1]) != masks.global_tokens(torch.tensor([False, True]))
    seen = torch.zeros(100, 100, dtype=torch.bool)
    kept = masks.from_dense(seen)
    assert lower(kept) is lower(masks.from_dense(seen)) and lower(kept).visible == 0
    seen[0] = True
    assert lower(kept).visible == 200, "a large tensor is looked at again when it has changed"
    lengths = torch.tensor([50, 70])
    small = masks.key_lengths(lengths)
    lengths.zero_()
    assert lower(small).visible == 100 * 120, "a small one was copied"


def test_lowered_masks_move_and_know_what_they_are_for() -> None:
    lowered = (masks.causal() & masks.key_lengths([3, 5]) | masks.dilated(9)).lower(2, 4, 64, 128)
    assert lowered.to("cpu") is lowered
    moved = lowered.to("meta")
    assert moved.shape.device.type == "meta" and moved.lists.bit_tiles.is_meta and moved.lists.full_counts is None
    lowered.check(2, 4, 64, 128, "cpu")
    for other in ((1, 4, 64, 128, "cpu"), (2, 8, 64, 128, "cpu"), (2, 4, 64, 64, "cpu"), (2, 4, 64, 128, "meta")):
        with pytest.raises(
            ValueError, match=r"mask was lowered for batch 2, heads 4, 64 queries, 128 keys on cpu, exp"
        ):
            lowered.check(*other)
    closed = masks.key_lengths([3, 5]).lower(2, 4, 64, 128).to("meta")
    assert closed.key_lengths.is_meta


def test_density_and_flops_count_the_seen_pairs() -> None:
    causal = masks.causal()
    assert causal.density(2, 3, 4, 4) == (causal | ~masks.window()).density(2, 3, 4, 4) == 10 / 16
    assert causal.density(1, 1, 0, 4) == 0
    assert causal.flops(2, 3, 4, 4, 32, 16) == 2 * 6 * 10 * (32 + 16)
    assert causal.flops(2, 3, 4, 4, 32, backward=True) == 2 * 6 * 10 * 5 * 32


def test_masks_are_drawn_as_block_pictures(tmp_path: Path) -> None:
    mask = masks.causal() & masks.window(128)
    title, caption, legend, *rows = mask.draw(256).splitlines()
    assert title == "causal & window(128)" and "█ full" in legend
    assert caption == "256 queries x 256 keys, density 37.79%, visited / ideal 1.49"
    assert rows == ["▒···", "█▒··", "▒█▒·", "·▒█▒"]
    assert mask.draw(256, width=2).splitlines()[3:] == ["▒·", "▒▒"]
    by_head = masks.blocks(torch.tensor([[[True]], [[False]]]))
    assert [by_head.draw(64, heads=2, at=(0, head))[-1] for head in (0, 1)] == ["█", "·"]
    mask.save_png(tmp_path / "mask.png", 256)
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


TWO = torch.ones(2, 2, dtype=torch.bool)
ELSEWHERE = torch.ones(1, device="meta", dtype=torch.int32)
COUNTED = masks.bigbird(style="huggingface")

ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "negative window": (lambda: masks.window(-1), ValueError, "left must not be negative"),
    "unsorted cu_seqlens": (lambda: masks.documents(cu_seqlens=[0, 5, 3]), ValueError, r"sorted, got \[0, 5"),
    "cu_seqlens without 0": (lambda: masks.documents(cu_seqlens=[1, 5]), ValueError, "begin with 0"),
    "ids and cu_seqlens": (lambda: masks.documents([1], cu_seqlens=[0, 1]), TypeError, "either ids or cu_seqlens"),
    "float ids": (lambda: masks.documents(torch.zeros(4)), TypeError, "ids must be int32 or int64, got torch.fl"),
    "ids of another length": (
        lambda: masks.documents([0, 1]).dense(1, 1, 2, 4),
        ValueError,
        "2 tokens, expected 4",
    ),
    "too many queries": (lambda: masks.documents([0, 0]).dense(1, 1, 3, 2), ValueError, "3 queries and 2 keys"),
    "another batch": (lambda: masks.key_lengths([1, 2]).lower(3, 1, 4, 4), ValueError, "batch of 2, expected 3"),
    "packed queries of another length": (
        lambda: masks.packed_sequences([0, 3], [0, 4]).lower(1, 1, 4, 4),
        ValueError,
        "cu_seqlens_q ends with 3, expected 4 tokens",
    ),
    "packed keys of another length": (
        lambda: masks.packed_sequences([0, 4], [0, 3]).lower(1, 1, 4, 4),
        ValueError,
        "cu_seqlens_k ends with 3, expected 4 tokens",
    ),
    "packed by different counts": (
        lambda: masks.packed_sequences([0, 4], [0, 1, 3]),
        ValueError,
        "the same number of sequences, got 1 and 2",
    ),
    "packed and unsorted": (
        lambda: masks.packed_sequences([0, 4], [0, -1]),
        ValueError,
        "cu_seqlens_k must begin",
    ),
    "packed without starts": (lambda: masks.packed_sequences(None, [0]), TypeError, "cu_seqlens_q must be a tens"),
    "packed in a negative window": (
        lambda: masks.packed_sequences([0], [0], window=(-1, 0)),
        ValueError,
        "window must not be negative",
    ),
    "packed and causal by a number": (
        lambda: masks.packed_sequences([0], [0], 3),
        TypeError,
        "causal must be a b",
    ),
    "global tokens past the end": (lambda: masks.global_tokens([4]).dense(1, 1, 4, 4), ValueError, "below 4 keys"),
    "negative global tokens": (lambda: masks.global_tokens([-1]), ValueError, "must not be negative, got -1"),
    "flags of another length": (lambda: masks.global_tokens(TWO).dense(2, 1, 4, 4), ValueError, "2 flags"),
    "step of zero": (lambda: masks.dilated(0), ValueError, "step must be at least 1, got 0"),
    "step of a float": (lambda: masks.dilated(2.0), TypeError, "step must be an integer, got float"),
    "negative counts": (
        lambda: masks.blocks(torch.tensor([[-1]])),
        ValueError,
        "grid must not be negative, got -1",
    ),
    "float mask": (lambda: masks.from_dense(torch.zeros(2, 2)), TypeError, "seen must be bool, got torch.float32"),
    "mask of a vector": (lambda: masks.from_dense(TWO[0]), ValueError, r"2 to 4 dimensions .* got \(2,\)"),
    "mask of another length": (lambda: masks.from_dense(TWO).lower(1, 1, 2, 3), ValueError, r"\(1, 1, 2, 3\)"),
    "mask of other heads": (
        lambda: masks.from_dense(TWO[:, :, None]).lower(1, 3, 2, 1),
        ValueError,
        r"1, 3, 2, 1",
    ),
    "grid of another size": (lambda: masks.blocks(TWO).lower(1, 1, 129, 128), ValueError, r"ted \(1, 1, 3, 2\)"),
    "tensor elsewhere": (lambda: masks.prefix(ELSEWHERE).lower(1, 1, 2, 2), ValueError, "on the CPU .* got meta"),
    "no function": (lambda: masks.from_function(3), TypeError, "function must be callable, got int"),
    "float function": (lambda: masks.from_function(lambda *at: at[2] * 1.0).dense(1, 1, 2, 2), TypeError, "bool"),
    "function of 5 dimensions": (
        lambda: masks.from_function(lambda *at: (at[2] > at[3]).expand(2, 1, 1, 2, 2)).dense(1, 1, 2, 2),
        TypeError,
        "must return one bool for a pair",
    ),
    "even window of blocks": (lambda: masks.bigbird(window_blocks=2), ValueError, "window_blocks must be odd"),
    "unknown style": (
        lambda: masks.bigbird(style="etc"),
        ValueError,
        "style must be one of paper, huggingface, got 'etc'",
    ),
    "bigbird across": (
        lambda: masks.bigbird().dense(1, 1, 64, 128),
        ValueError,
        "as many keys as queries, got 64 queries and 128 keys",
    ),
    "counts in an or": (lambda: COUNTED | masks.causal(), ValueError, "combines with & only"),
    "counts in a not": (lambda: ~COUNTED, ValueError, "combines with & only"),
    "and instead of &": (lambda: masks.causal() and masks.window(3), TypeError, "not with and, or, not"),
    "mask and number": (lambda: masks.causal() & 3, TypeError, "unsupported operand"),
    "picture of no head": (lambda: masks.causal().draw(64, at=(0, 1)), ValueError, "a head from 0 to 0, got 1"),
    "no batch size": (lambda: masks.causal().lower(-1, 1, 2, 2), ValueError, "batch must be at least 0, got -1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_named(name: str) -> None:
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("shape", [(1, 1, 0, 70), (1, 1, 70, 0), (0, 2, 64, 64)])
def test_empty_shapes_have_empty_lists(shape: tuple) -> None:
    some = masks.key_lengths([3] * shape[0]) | masks.dilated(2) & masks.from_function(some_predicate)
    lowered = some.lower(*shape)
    assert lowered.visible == lowered.visited_granules == 0
    lists = some.lower(*shape, closed_forms=False).lists
    assert lists is not None and lists.full_columns.numel() == lists.partial_columns.numel() == 0
    assert decode(lists, *shape)[0].shape == shape
    assert (lists.row_items[:, 1:] == torch.tensor([0, 1, -1])).all() and not lists.row_merges.numel()
