"""Masks under other libraries' names and definitions: alignments, scalar functions, empty inputs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

import fastattn
from fastattn import masks
from fastattn.masks import Mask, decode

SHAPES = [(1, 1, 5, 5), (2, 2, 100, 60), (1, 2, 60, 100), (1, 1, 1, 70), (1, 1, 70, 1)]


def by_lists(mask: Mask, shape: tuple) -> Tensor:
    lists = mask.lower(*shape, closed_forms=False).lists
    assert lists is not None
    return decode(lists, *shape)[0]


def agrees(mask: Mask, seen: Tensor, shape: tuple) -> None:
    """The definition, the lists and what attention computes say the same."""
    seen = seen.expand(shape)
    assert torch.equal(mask.dense(*shape).expand(shape), seen)
    assert torch.equal(by_lists(mask, shape), seen)
    batch, heads, queries, keys = shape
    q = torch.randn(batch, heads, queries, 8, dtype=torch.float64)
    k, v = (torch.randn(batch, heads, keys, 8, dtype=torch.float64) for _ in range(2))
    for backend in ("portable", "reference"):
        out = fastattn.attention(q, k, v, mask=mask, backend=backend)
        torch.testing.assert_close(out, fastattn.attention(q, k, v, bias=seen, backend="reference"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("left", "right"), [(None, 0), (3, 0), (3, 2), (None, None), (0, None), (70, 70)])
def test_aligned_top_left_query_i_stands_at_key_i(shape: tuple, left: int | None, right: int | None) -> None:
    distance = torch.arange(shape[3]) - torch.arange(shape[2])[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen = seen if left is None else seen & (distance >= -left)
    seen = seen if right is None else seen & (distance <= right)
    agrees(masks.window(left, right, align="top-left"), seen, shape)
    if (left, right) == (None, 0):
        agrees(masks.causal(align="top-left"), seen, shape)
    agrees(
        masks.window(left, right, align="top-left") | masks.dilated(3),
        seen | masks.dilated(3).dense(*shape),
        shape,
    )


def test_a_mask_and_its_alignment_print_as_they_are_written() -> None:
    for text in ("window(3, 0, align='top-left')", "window(2, align='top-left')"):
        assert repr(eval(f"masks.{text}")) == text
    assert repr(masks.causal(align="top-left")) == "causal(align='top-left')"


TABLE = torch.tensor([[0, 30], [30, 100], [3, 5], [40, 90]])
DOCUMENT = torch.arange(200) // 7
OFFSETS = torch.tensor([5, 9])
SCALARS = {
    "a table of scalars": lambda b, h, i, j: (i >= TABLE[j // 30][0]) & (i < TABLE[j // 30][1]),
    "documents and causal": lambda b, h, i, j: (DOCUMENT[i] == DOCUMENT[j]) & (i >= j),
    "by batch element": lambda b, h, i, j: i + OFFSETS[b] >= j,
    "by head, in steps": lambda b, h, i, j: (TABLE[h][1] > i) & (TABLE[b][0] <= j),
    "where": lambda b, h, i, j: torch.where(i < 10, j < 10, j >= i),
    "rows of a table": lambda b, h, i, j: (TABLE[j % 4] > i).all(),
    "a constant": lambda b, h, i, j: torch.tensor(True),
}


@pytest.mark.parametrize("shape", [(1, 1, 100, 60), (2, 2, 70, 100), (2, 2, 2, 2), (1, 2, 64, 64), (1, 1, 1, 1)])
@pytest.mark.parametrize("name", SCALARS)
def test_functions_of_one_pair_are_what_flex_attention_makes_of_them(name: str, shape: tuple) -> None:
    agrees(masks.from_function(SCALARS[name]), create_mask(SCALARS[name], *shape, device="cpu"), shape)


# Indices that fit by chance when asked of many positions at once: row j of a square table, not its element.
SQUARE = torch.rand(64, 64) < 0.5


def test_what_a_function_says_of_one_pair_counts_where_broadcasting_says_otherwise() -> None:
    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return SQUARE[j][..., i]

    agrees(masks.from_function(mask_mod), SQUARE.T, (1, 1, 64, 64))


def uses_and(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i >= j) and (j > 3)


def uses_if(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j if i > 5 else j == 0


def too_far(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.zeros(3, dtype=torch.bool)[i]


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (uses_and, ValueError, r"from_function\(uses_and\) uses Python's and, or, not, if"),
        (uses_if, ValueError, r"from_function\(uses_if\) uses Python's and, or, not, if"),
        (lambda b, h, i, j: 0 < i <= j, ValueError, r"from_function\(<lambda>\) uses Python's and, or"),
        (lambda b, h, i, j: not (i > j), ValueError, "uses Python's and, or, not"),
        (too_far, ValueError, r"from_function\(too_far\) failed: IndexError: index"),
        (lambda b, h, i, j: 1 / 0, ValueError, "failed: ZeroDivisionError"),
        (lambda i, j: i >= j, ValueError, "failed: TypeError: .* takes 2 .*with .batch, head, query, key"),
        (lambda b, h, i, j: i - j, TypeError, r"must return a bool tensor, got torch.int64"),
        (lambda b, h, i, j: True, TypeError, "must return a bool tensor, got bool"),
        (lambda b, h, i, j: None, TypeError, "must return a bool tensor, got NoneType"),
        (
            lambda b, h, i, j: torch.ones(3, dtype=torch.bool),
            TypeError,
            r"one bool for a pair, got shape \(3,\)",
        ),
    ],
)
def test_what_a_function_raises_or_returns_wrongly_is_said_with_its_name(function, error, message: str) -> None:
    mask = masks.from_function(function)
    for ask in (lambda: mask.dense(2, 2, 70, 60), lambda: mask.lower(2, 2, 70, 60)):
        with pytest.raises(error, match=message):
            ask()


def kinds(batch: int, heads: int, queries: int, keys: int) -> list[Mask]:
    """Every kind of mask that fits the shape."""
    made = [
        masks.causal(),
        masks.causal(align="top-left"),
        masks.window(2, 0),
        masks.key_lengths([0] * batch),
        masks.key_lengths(torch.zeros(batch, dtype=torch.int32)),
        masks.prefix(0),
        masks.global_tokens([]),
        masks.global_tokens(torch.zeros(batch, keys, dtype=torch.bool)),
        masks.dilated(3),
        masks.blocks(torch.ones(batch, heads, -(-queries // 16), -(-keys // 16), dtype=torch.bool), 16),
        masks.from_function(lambda b, h, i, j: i >= j),
        masks.from_dense(torch.zeros(batch, heads, queries, keys, dtype=torch.bool)),
        masks.packed_sequences([0, queries], [0, keys], causal=True),
        masks.packed_sequences([0, 0, queries, queries], [0, keys, keys, keys]),
        masks.longformer(4),
    ]
    if not queries and not keys:
        made += [masks.packed_sequences([0], [0]), masks.documents(cu_seqlens=[0])]
    if queries <= keys:
        made.append(masks.documents(torch.zeros(batch, keys, dtype=torch.int64)))
        made.append(masks.documents(torch.zeros(keys, dtype=torch.int64)))
        made.append(masks.documents(cu_seqlens=[0, 0, keys, keys]))
    if queries == keys:
        made.append(masks.bigbird(16))
        made.append(masks.bigbird(4, 1, style="huggingface"))
    return made


EMPTY = [(1, 2, 0, 0), (1, 2, 0, 8), (1, 2, 8, 0), (0, 2, 8, 8), (2, 0, 8, 8), (0, 2, 0, 8)]


@pytest.mark.parametrize("shape", [*EMPTY, (1, 2, 8, 8)])
def test_nothing_in_a_mask_or_in_a_batch_is_a_mask_alone_and_combined(shape: tuple) -> None:
    made = kinds(*shape)
    for mask, other in zip(made, made[1:] + made[:1], strict=True):
        joined = [mask] if mask.repeats else [mask, ~mask]
        joined += [mask & other] if mask.repeats or other.repeats else [mask & other, mask | ~other]
        for each in joined:
            seen = each.dense(*shape)
            assert (
                seen.shape[0] in (1, shape[0]) and seen.shape[1] in (1, shape[1]) and seen.shape[2:] == shape[2:]
            )
            lists = each.lower(*shape, closed_forms=False).lists
            assert torch.equal(decode(lists, *shape)[0], seen.expand(shape)), each
            assert 0 <= each.density(*shape) <= 1


@pytest.mark.parametrize(
    ("shape", "backend"), list(itertools.product([*EMPTY, (1, 2, 8, 8)], ["portable", "reference", "triton"]))
)
def test_attention_under_masks_of_nothing_and_its_gradients(shape: tuple, backend: str) -> None:
    batch, heads, queries, keys = shape
    if not heads:
        pytest.skip("no heads: see tests of attention")
    for mask in kinds(*shape):
        q = torch.randn(batch, heads, queries, 8, requires_grad=True)
        k, v = (torch.randn(batch, heads, keys, 8, requires_grad=True) for _ in range(2))
        if backend == "triton" and not fastattn.core.capabilities.interpreting() and q.device.type == "cpu":
            pytest.skip("no GPU and no interpreter")
        out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True, backend=backend)
        out.sum().backward()
        assert not any(t.isnan().any() for t in (out, lse, q.grad, k.grad, v.grad)), mask
        if not keys:
            assert not out.any() and bool((lse == -torch.inf).all()), mask
