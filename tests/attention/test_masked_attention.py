"""Any mask: attention reads block lists, and computes what the dense mask says."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from attention_problems import MASKS, ON_SCORES, Problem, check, implementation, run, strategies_of
from hardware import DEVICE, ON_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fastattn
from fastattn import masks
from fastattn.core.attention import definition as attention_definition
from fastattn.core.attention import granules, tiles
from fastattn.core.attention import portable as attention_portable
from fastattn.kernels import launch
from fastattn.kernels.attention import backward, forward, splits
from fastattn.measuring.measure import peak_memory


@pytest.mark.parametrize("name", ["triton", "portable", "reference"])
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask_is_exact_forward_and_backward(kind: str, name: str) -> None:
    problem = Problem(lists=kind, heads=2, key_heads=1, queries=140, keys=150, lse_gradient=True)
    if kind in ("not causal", "bigbird"):
        problem = replace(problem, queries=150)
    check(problem, name)


@pytest.mark.parametrize("name", ["triton", "portable", "reference"])
@pytest.mark.parametrize("lengths", [False, True])
def test_intervals_are_exact_forward_and_backward(lengths: bool, name: str) -> None:
    check(Problem(intervals=True, heads=4, queries=90, keys=110, lengths=lengths, lse_gradient=True), name)


@pytest.mark.parametrize("name", ["triton", "portable"])
@settings(max_examples=3 if not ON_GPU else 100)
@given(
    kind=st.sampled_from(["intervals", *MASKS]),
    queries=st.integers(129, 160),
    keys=st.integers(129, 160),
    width=st.sampled_from([8, 24, 32]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    **strategies_of(*ON_SCORES),
)
def test_masks_combine_with_everything_else(name: str, kind: str, **given_: object) -> None:
    mask = {"intervals": True} if kind == "intervals" else {"lists": kind}
    problem = Problem(heads=2, key_heads=1, **mask, **given_)
    if problem.lists == "bigbird":
        problem = replace(problem, keys=problem.queries)
    check(problem, name)


@pytest.mark.parametrize("name", ["triton", "portable"])
def test_long_rows_and_columns_are_shared_out_and_merged(name: str) -> None:
    problem = Problem(lists="global", heads=1, key_heads=1, queries=770, keys=770, sinks=True, lse_gradient=True)
    lists = problem.lowered().lists
    assert lists.row_merges.tolist() == lists.column_merges.tolist() == [[0, 0, 2]]
    check(problem, name)


FEW = {
    "few queries": {"queries": 20, "keys": 300},
    "few queries, causal": {"queries": 20, "keys": 300, "causal": True, "sinks": True},
    "few queries, window": {"queries": 30, "keys": 300, "window": (150, 3), "lengths": True, "batch": 2},
    "few keys": {"queries": 300, "keys": 20, "heads": 2},
    "few keys, window": {"queries": 290, "keys": 30, "heads": 2, "window": (250, 100), "dropout": 0.3},
    "few keys, intervals": {"queries": 290, "keys": 30, "intervals": True},
}


@pytest.mark.parametrize("few", FEW)
def test_few_programs_share_their_walks(few: str, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = []
    merge = splits.merge
    for module in (forward, backward):
        monkeypatch.setattr(module, "merge", lambda *given: (merged.append(given[0].slots), merge(*given)))
    monkeypatch.setattr(launch, "INTERPRETED_PROCESSORS", 12)
    check(Problem(**{"heads": 1, "key_heads": 1, "lse_gradient": True, **FEW[few]}), "triton")
    assert max(merged) > 1


def test_walks_are_split_while_shares_are_long_enough_and_processors_idle() -> None:
    assert launch.splits(programs=8, steps=128, processors=132) == 16
    assert launch.splits(programs=8, steps=40, processors=132) == 40 // launch.LEAST_STEPS
    assert launch.splits(programs=100, steps=128, processors=132) == 1
    assert launch.splits(programs=0, steps=0, processors=132) == 1


@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_a_mask_of_closed_forms_needs_no_lists_and_joins_what_is_beside_it(backend: str) -> None:
    q, k, v = Problem(queries=60, keys=80).inputs()
    mask = masks.window(20, 30) & masks.key_lengths([70])
    assert mask.lower(1, 2, 60, 80, DEVICE).lists is None
    ours = fastattn.attention(q, k, v, mask=mask, causal=True, window=(25, None), backend=backend)
    expected = fastattn.attention(
        q, k, v, causal=True, window=(20, None), key_lengths=torch.tensor([70], device=DEVICE), backend="reference"
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_causal_beside_a_mask_of_lists_is_one_more_condition(backend: str) -> None:
    q, k, v = Problem(queries=100, keys=100).inputs()
    mask = masks.documents(torch.arange(100) // 30)
    seen = (mask & masks.causal()).dense(1, 2, 100, 100, DEVICE)
    ours = fastattn.attention(q, k, v, mask=mask, causal=True, backend=backend)
    torch.testing.assert_close(ours, fastattn.attention(q, k, v, bias=seen, backend="reference"))


@pytest.mark.parametrize("name", ["triton", "portable"])
def test_keys_of_granules_that_nobody_sees_are_not_read(name: str) -> None:
    # Documents of 512: a tile of the portable backend's lies in one.
    q, k, v = Problem(heads=1, key_heads=1, queries=64, keys=1088).inputs()
    grid = torch.zeros(1, 17, dtype=torch.bool)
    grid[0, [0, 3]] = True
    spoiled = torch.ones(1088, dtype=torch.bool, device=DEVICE)
    spoiled[:512] = False
    clean = fastattn.attention(q, k, v, mask=masks.blocks(grid), backend="reference")
    with implementation(name) as backend:
        leaves = [t.requires_grad_() for t in (q, *(t.masked_fill(spoiled[:, None], torch.nan) for t in (k, v)))]
        out = fastattn.attention(*leaves, mask=masks.blocks(grid), backend=backend)
        dq, dk, _ = torch.autograd.grad(out.sum(), leaves)
    torch.testing.assert_close(out, clean)
    assert torch.isfinite(dq).all() and not dk[:, :, 512:].any()


FLEX = {
    "causal": masks.causal(),
    "window": masks.window(20, 30),
    "key lengths": masks.key_lengths([100, 130]),
    "prefix": masks.causal() | masks.prefix([60, 7]),
    "documents": masks.documents(torch.arange(130) // 40) & masks.causal(),
    "scattered documents": masks.documents(torch.arange(130) % 3),
    "longformer": masks.longformer(8, [0, 77]),
    "dilated": masks.dilated(7) & ~masks.window(0, 20),
    "blocks": masks.blocks(torch.eye(5, dtype=torch.bool), 30),
    "bigbird": masks.bigbird(block=16, random=1),
}


@pytest.mark.parametrize("backend", ["triton", "portable"])
@pytest.mark.parametrize("kind", FLEX)
def test_equal_to_flex_attention(kind: str, backend: str) -> None:
    q, k, v = Problem(batch=2, heads=2, queries=130, keys=130).inputs()
    seen = FLEX[kind].dense(2, 2, 130, 130, DEVICE).expand(2, 2, -1, -1)
    block_mask = create_block_mask(lambda b, h, i, j: seen[b, h, i, j], 2, 2, 130, 130, device=DEVICE)
    expected = flex_attention(q, k, v, block_mask=block_mask)
    ours = fastattn.attention(q, k, v, mask=FLEX[kind], backend=backend)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("mask", [{"lists": "random"}, {"intervals": True}])
def test_samples_of_a_vmap_share_the_mask(mask: dict) -> None:
    problem = Problem(batch=2, queries=70, keys=70, **mask)
    q, k, v = (torch.stack([t] * 3) * torch.randn(3, 1, 1, 1, 1, device=DEVICE) for t in problem.inputs())
    mask = problem.lowered()

    def loss(q, k, v):
        return fastattn.attention(q, k, v, mask=mask).square().sum()

    ours = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    for i in range(3):
        torch.testing.assert_close(ours[i], torch.func.grad(loss)(q[i], k[i], v[i]))


@pytest.mark.parametrize("mode", ["gradgrad", "forward"])
def test_second_derivatives_and_forward_mode_through_a_mask(mode: str) -> None:
    problem = Problem(lists="documents", heads=1, key_heads=1, queries=70, keys=70, width=8, value_width=8)
    q, k, v = (t.double() for t in problem.inputs())
    mask = MASKS[problem.lists]  # lowered within the transform

    def ours(q):
        return fastattn.attention(q, k, v, mask=mask).sin().sum()

    def exact(q):
        return attention_definition.attention(q, k, v, problem.spec, problem.score_tensors())[0].sin().sum()

    tangent = torch.randn_like(q)
    if mode == "forward":
        a, e = (torch.func.jvp(f, (q,), (tangent,))[1] for f in (ours, exact))
    else:
        a, e = (torch.func.grad(lambda q, f=f: torch.func.grad(f)(q).square().sum())(q) for f in (ours, exact))
    torch.testing.assert_close(a, e)


@pytest.mark.parametrize("mask", [{"lists": "documents"}, {"intervals": True}])
def test_masks_compile_without_a_graph_break(mask: dict) -> None:
    torch._dynamo.reset()
    problem = Problem(queries=70, keys=70, **mask)
    mask = problem.lowered()

    def function(q, k, v):
        return fastattn.attention(q * 2, k, v, mask=mask)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    upstream = (torch.randn(1, 2, 70, 16, device=DEVICE), None)
    inputs = problem.inputs()
    for a, e in zip(
        run(inputs, upstream, lambda *t: (compiled(*t), torch.zeros(()))),
        run(inputs, upstream, lambda *t: (function(*t), torch.zeros(()))),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


def test_a_mask_that_is_not_lowered_is_refused_by_the_compiler_in_words() -> None:
    torch._dynamo.reset()
    q, k, v = Problem(queries=70, keys=70).inputs()
    compiled = torch.compile(fastattn.attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"mask must be lowered before torch\.compile"):
        compiled(q, k, v, mask=masks.dilated(3))


def test_a_mask_that_does_not_fit_is_named() -> None:
    q, k, v = Problem(queries=70, keys=70).inputs()
    with pytest.raises(TypeError, match=r"mask must be a value of fastattn\.masks, lowered or not, got Tensor"):
        fastattn.attention(q, k, v, mask=torch.ones(70, 70, dtype=torch.bool))
    lowered = masks.dilated(2).lower(1, 2, 70, 71)
    with pytest.raises(ValueError, match="mask was lowered for batch 1, heads 2, 70 queries, 71 keys"):
        fastattn.attention(q, k, v, mask=lowered)
    with pytest.raises(ValueError, match="mask must lie within causal and window if it is lowered"):
        fastattn.attention(q, k, v, mask=masks.dilated(2).lower(1, 2, 70, 70, DEVICE), causal=True)


# The portable backend: batches of entries

IN_ENTRIES = {
    # Blocks of 16, so that pairs of one granule count differently, and it has several entries.
    "counted": masks.blocks(torch.tensor([[(3 * i + 5 * j) % 7 % 4 for j in range(9)] for i in range(9)]), 16),
    # Two patterns of different sizes, in another order for each batch element.
    "patterns": masks.from_function(lambda b, h, i, j: (i // 7 + j) % 5 + ((b + h) % 2) * (i - j) // 3 > 1),
}


def entries_at_once(entries: int, looked_up: int | None = None):
    """Inside the block, entries are computed so many at a time, if heads are not wider than a granule."""
    elements = entries * masks.GRANULE**2
    sizes = {"FEWEST_ELEMENTS": elements, "MOST_ELEMENTS": elements, "LOOKED_UP": looked_up or 2 * entries + 1}
    return mock.patch.multiple(granules, **sizes)


@pytest.mark.parametrize("kind", IN_ENTRIES)
def test_every_head_reads_its_own_list(kind: str) -> None:
    problem = Problem(lists=kind, batch=2, heads=6, key_heads=3, queries=144, keys=144, dtype=torch.float64)
    with mock.patch.dict(MASKS, IN_ENTRIES):
        lists = problem.lowered().lists
        assert lists.pattern.tolist() == ([[0]] if kind == "counted" else [[0, 1] * 3, [1, 0] * 3])
        check(problem, "portable")


@settings(max_examples=40 if not ON_GPU else 100)
@given(
    entries=st.sampled_from([1, 3, 1000]),
    kind=st.sampled_from(["intervals", *IN_ENTRIES, *MASKS]),
    group=st.integers(1, 3),
    keys=st.integers(129, 144),
    **strategies_of("batch", "key_heads"),
    queries=st.integers(129, 144),
    width=st.integers(8, 80),
    value_width=st.integers(8, 80),
    scale=st.sampled_from([None, 0.5]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    **{**strategies_of("layout", "lse_gradient", *ON_SCORES), "radius": st.none() | st.integers(0, 140)},
)
def test_batches_of_entries_are_exact_wherever_they_cut(
    entries: int, kind: str, group: int, keys: int, **given_: object
) -> None:
    mask = {"intervals": True} if kind == "intervals" else {"lists": kind}
    problem = Problem(heads=group * given_["key_heads"], keys=keys, **mask, **given_)
    if kind == "bigbird":
        problem = replace(problem, keys=problem.queries)
    if problem.dtype == torch.float64:
        problem = replace(problem, alibi=False)  # the definition rounds slope times distance as the slopes are
    with entries_at_once(entries), mock.patch.dict(MASKS, IN_ENTRIES):
        assert granules.serves(problem.spec, problem.score_tensors())
        check(problem, "portable")


@pytest.mark.parametrize("entries", [2, 1000])
def test_results_of_entries_are_the_same_to_the_bit(entries: int) -> None:
    problem = Problem(lists="random", batch=2, heads=4, queries=300, keys=300)
    inputs, upstream = problem.inputs(), (torch.randn(2, 4, 300, 16, device=DEVICE), None)

    def call(q, k, v):
        return fastattn.attention(q, k, v, mask=problem.lowered(), return_lse=True, backend="portable")

    with entries_at_once(entries):
        first, *others = (run(inputs, upstream, call) for _ in range(5))
    assert all(torch.equal(a, e) for other in others for a, e in zip(other, first, strict=True))


@pytest.mark.parametrize("layout", ["packed", "one value", "offset", "transposed"])
def test_entries_are_gathered_from_any_layout(layout: str) -> None:
    packed = torch.randn(2, 130, 3, 4, 16, device=DEVICE)
    q, k, v = packed.transpose(1, 3).unbind(2)
    if layout == "one value":
        q, k, v = (t[:1, :1, :1, :1].expand(2, 4, 130, 16) for t in (q, k, v))
    elif layout == "offset":
        q, k, v = (t[..., 3:13] for t in (q, k, v))
    elif layout == "transposed":
        q, k, v = (torch.randn(2, 4, 16, 130, device=DEVICE).mT for _ in "qkv")
    mask = masks.dilated(3)

    def call(backend):
        return lambda *t: fastattn.attention(*t, mask=mask, return_lse=True, backend=backend)

    # The sum's gradient has stride zero in every dimension.
    upstream = torch.ones((), device=DEVICE).expand(q.shape), None
    for a, e in zip(
        run((q, k, v), upstream, call("portable")), run((q, k, v), upstream, call("reference")), strict=True
    ):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_rows_of_entries_that_see_nothing_give_zero_and_zero_gradients(backend: str) -> None:
    # Rows of 0 to 2 bits, a row of granules without an entry, and a batch element without keys.
    mask = masks.from_function(lambda b, h, i, j: (i % 3 > 0) & (i < 64) & ((j == 5) | (j == i)) & (b == 0))
    q, k, v = Problem(batch=2, queries=130, keys=130).inputs()
    seen = mask.dense(2, 2, 130, 130, DEVICE).any(-1).expand(2, 2, 130)
    upstream = torch.randn(2, 2, 130, 16, device=DEVICE), torch.randn(2, 2, 130, device=DEVICE)
    out, lse, dq, dk, dv = run(
        (q, k, v), upstream, lambda *t: fastattn.attention(*t, mask=mask, return_lse=True, backend=backend)
    )
    assert torch.equal(lse == float("-inf"), ~seen)
    assert not out[~seen].any() and not dq[~seen].any() and not dk[1].any() and not dv[1].any()
    assert all(torch.isfinite(t).all() for t in (out, dq, dk, dv))


BESIDE = {
    "bias": {"bias": (0, 0, 0, 0)},
    "bias of keys": {"bias": (0, 1, 1, 0)},
    "mask of keys": {"bias": (0, 1, 1, 0), "masked": True},
    "bias of queries, for all": {"bias": (1, 1, 0, 1)},
    "relative bias": {"radius": 3},
    "dropout": {"dropout": 0.3},
    "all": {"bias": (0, 0, 0, 0), "radius": 200, "dropout": 0.3, "softcap": 2.0, "alibi": True, "sinks": True},
}


@pytest.mark.parametrize("mask", [{"lists": "documents"}, {"intervals": True}], ids=["lists", "intervals"])
@pytest.mark.parametrize("beside", BESIDE)
def test_whatever_stands_beside_the_mask_no_tile_that_nobody_sees_is_computed(beside: str, mask: dict) -> None:
    problem = Problem(queries=140, keys=150, lengths=True, lse_gradient=True, batch=2, **mask, **BESIDE[beside])
    unused = mock.patch.object(tiles, "Scores", side_effect=AssertionError("computed tile by tile"))
    with unused, mock.patch.object(attention_portable, "Scores", tiles.Scores):
        check(problem, "portable")


@pytest.mark.parametrize("name", ["triton", "portable"])
@pytest.mark.parametrize("bias", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0)])
def test_hidden_pairs_have_no_gradient_of_the_bias_to_the_bit(bias: tuple, name: str) -> None:
    problem = Problem(batch=2, queries=100, keys=110, lists="documents", bias=bias, dropout=0.3)
    inputs, tensors = problem.inputs(), problem.score_tensors()
    leaf = tensors.bias.requires_grad_()
    given = problem.arguments(tensors) | {"backend": name}
    fastattn.attention(*inputs, **given).square().sum().backward()
    seen = MASKS["documents"].dense(2, 2, 100, 110, DEVICE).expand(2, 2, -1, -1)
    assert not leaf.grad[~seen[: leaf.shape[0], : leaf.shape[1]]].any() and leaf.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_memory_grows_with_the_length_even_where_entries_grow_with_its_square(dtype: torch.dtype) -> None:
    def peak(length: int) -> int:
        q, k, v = (torch.randn(1, 1, length, 64, device=DEVICE, dtype=dtype, requires_grad=True) for _ in "qkv")
        mask = masks.from_function(lambda b, h, i, j: (i + j) % 5 > 0).lower(1, 1, length, length, DEVICE)

        def call() -> None:
            fastattn.attention(q, k, v, mask=mask, backend="portable").sum().backward()

        return peak_memory(call, torch.device(DEVICE))

    with entries_at_once(8, looked_up=granules.LOOKED_UP):
        assert peak(2048) < 4.2 * peak(512)
