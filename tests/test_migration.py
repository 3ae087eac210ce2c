"""Every line of MIGRATION's tables: what theirs is called here, against its definition."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention

import fastattn
from fastattn import masks

TEXT = (Path(__file__).parents[1] / "MIGRATION.md").read_text()


def table(section: str) -> dict[str, str]:
    """The rows of a section's table, left to right."""
    lines = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M).group(1).splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:3] for line in lines if line.startswith("|")]
    return {left.strip().replace("\\|", "|"): right.strip().replace("\\|", "|") for left, right in rows[2:]}


XFORMERS, FLEX = table("xformers"), table("flex_attention")
QUERIES, KEYS = [3, 0, 7, 2], [5, 4, 7, 1]
LENGTHS, ROOM = [4, 2, 9, 3], [0, 6, 10, 20, 24]
W, LEFT, RIGHT = 3, 2, 1


def ends(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def block(queries: int, keys: int, left: int | None, right: int | None, bottom_right: bool) -> Tensor:
    """Query i stands at key i, or the last query at the last key; from `left` before it to `right` after it."""
    at = torch.arange(queries)[:, None] + (keys - queries if bottom_right else 0)
    distance = torch.arange(keys) - at
    seen = torch.ones(queries, keys, dtype=torch.bool)
    seen = seen if left is None else seen & (distance >= -left)
    return seen if right is None else seen & (distance <= right)


def blocks(key_starts: list[int], keys: list[int], total: int, *how) -> Tensor:
    seen = torch.zeros(sum(QUERIES), total, dtype=torch.bool)
    for q, n, k, m in zip(ends(QUERIES), QUERIES, key_starts, keys, strict=False):
        seen[q : q + n, k : k + m] = block(n, m, *how)
    return seen


WHOLE, TOP, BOTTOM = (None, None, True), (None, 0, False), (None, 0, True)
LOCAL, LOCAL_TOP, BOTH = (W - 1, 0, True), (W - 1, 0, False), (LEFT, RIGHT, True)
DEFINITIONS = {
    "LowerTriangularMask": TOP,
    "LowerTriangularMaskWithTensorBias": TOP,
    "LowerTriangularFromBottomRightMask": BOTTOM,
    "LowerTriangularFromBottomRightLocalAttentionMask": LOCAL,
    "LocalAttentionFromBottomRightMask": BOTH,
    "BlockDiagonalMask": WHOLE,
    "BlockDiagonalCausalMask": TOP,
    "BlockDiagonalCausalFromBottomRightMask": BOTTOM,
    "BlockDiagonalCausalLocalAttentionMask": LOCAL_TOP,
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": LOCAL,
    "BlockDiagonalPaddedKeysMask": WHOLE,
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": BOTTOM,
    "BlockDiagonalLocalAttentionPaddedKeysMask": BOTH,
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": LOCAL,
    "BlockDiagonalGappyKeysMask": WHOLE,
    "BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask": BOTH,
    "BlockDiagonalCausalWithOffsetGappyKeysMask": BOTTOM,
}


def test_the_table_of_xformers_names_every_class() -> None:
    assert {name.strip("`") for name in XFORMERS} == {*DEFINITIONS, "PagedBlockDiagonal...` (keys in pages)"}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_bias_of_xformers_is_what_the_table_says(name: str) -> None:
    how = DEFINITIONS[name]
    if not name.startswith("Block"):
        seen = block(9, 14, *how)
    elif "Padded" in name or "Gappy" in name:
        seen = blocks(ROOM, LENGTHS, ROOM[-1], *how)
    else:
        seen = blocks(ends(KEYS), KEYS, sum(KEYS), *how)
    expression = re.search(r"`(masks\..*?)`", XFORMERS[f"`{name}`"]).group(1)
    names = {
        "q": ends(QUERIES),
        "k": ends(KEYS),
        "room": ROOM,
        "lengths": LENGTHS,
        "w": W,
        "left": LEFT,
        "right": RIGHT,
    }
    mask = eval(expression, {"masks": masks}, names)
    shape = (1, 2, *seen.shape)
    assert torch.equal(mask.dense(*shape), seen[None, None])
    q, k, v = (
        torch.randn(1, 2, n, 16, dtype=torch.float64) for n in (seen.shape[0], seen.shape[1], seen.shape[1])
    )
    for backend in ("portable", "reference"):
        out = fastattn.attention(q, k, v, mask=mask, backend=backend)
        torch.testing.assert_close(out, fastattn.attention(q, k, v, bias=seen, backend="reference"))


R, CAP = 40, 5.0
B, H, Q, KV = 2, 2, 40, 40
NAMES = {
    "lengths": torch.tensor([30, 7]),
    "ids": torch.arange(KV) // 9,
    "dense": torch.rand(B, H, Q, KV) < 0.7,
    "bias": torch.randn(B, H, Q, KV),
    "slopes": torch.tensor([0.5, 0.1]),
    "table": torch.randn(H, 2 * R + 1),
    "cap": CAP,
    "R": R,
    "tanh": torch.tanh,
    "masks": masks,
    "B": B, "H": H, "Q": Q, "KV": KV, "device": "cpu",
}  # fmt: skip
MASK_MODS = [row for row in FLEX if row.startswith("`mask_mod`: ")]
SCORE_MODS = [row for row in FLEX if row.startswith("`score_mod`: ")]


@pytest.mark.parametrize("row", MASK_MODS)
def test_a_mask_mod_is_what_the_table_says(row: str) -> None:
    theirs = eval(f"lambda b, h, q_idx, kv_idx: {row.split('`')[3]}", NAMES)
    ours = eval(FLEX[row].strip("`"), NAMES)
    for queries, keys in ((Q, KV), (23, KV), (Q, 23)):
        holds_positions = any(name in row for name in ("ids", "dense"))
        if holds_positions and (queries, keys) != (Q, KV):
            continue
        expected = create_mask(theirs, B, H, queries, keys, device="cpu")
        for mask in (ours, masks.from_function(theirs)):
            assert torch.equal(mask.dense(B, H, queries, keys).expand_as(expected), expected)
    q, k, v = (torch.randn(B, H, Q, 16) for _ in range(3))
    out = fastattn.attention(q, k, v, mask=ours)
    expected = fastattn.attention(
        q, k, v, bias=create_mask(theirs, B, H, Q, KV, device="cpu"), backend="reference"
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("row", SCORE_MODS)
def test_a_score_mod_is_what_the_table_says(row: str) -> None:
    expression = row.split("`")[3].replace("tanh(score / cap)", "(score / cap).tanh()")
    theirs = eval(f"lambda score, b, h, q_idx, kv_idx: {expression}", NAMES)
    options = eval(f"dict({FLEX[row].strip('`')})", NAMES)
    q, k, v = (torch.randn(B, H, Q, 16) for _ in range(3))
    bound = theirs
    if "causal" in row:

        def bound(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i >= j, theirs(score, b, h, i, j), -torch.inf)

    torch.testing.assert_close(fastattn.attention(q, k, v, **options), flex_attention(q, k, v, score_mod=bound))


def test_joined_and_lowered_mask_mods_are_as_the_table_says() -> None:
    names = {**NAMES, "a": lambda b, h, i, j: i >= j, "b": lambda b, h, i, j: (i + j) % 3 > 0}
    both, either = (
        eval(text, names) for text in re.findall(r"`(.*?)`", FLEX["`and_masks(a, b)`, `or_masks(a, b)`"])
    )
    first, second = (create_mask(names[name], B, H, Q, KV, device="cpu") for name in "ab")
    assert torch.equal(both.dense(B, H, Q, KV).expand_as(first), first & second)
    assert torch.equal(either.dense(B, H, Q, KV).expand_as(first), first | second)
    lowered = eval(
        re.search(r"`(.*?)`", FLEX["`create_block_mask(mask_mod, B, H, Q, KV)`, `BlockMask`"]).group(1),
        {**names, "mask_mod": names["a"]},
    )
    q, k, v = (torch.randn(B, H, Q, 16) for _ in range(3))
    torch.testing.assert_close(fastattn.attention(q, k, v, mask=lowered), fastattn.attention(q, k, v, causal=True))
    assert FLEX["`mask_mod`"] == "`masks.from_function(mask_mod)`"


def test_what_an_engine_would_call_gives_the_same_by_both_functions() -> None:
    code = re.search(r"^## vLLM and SGLang\n.*?```python\n(.*?)```", TEXT, re.S | re.M).group(1)
    step, packed = (f"out = {call}" for call in code.split("out = ")[1:])
    rows, page, lengths = 3, 16, torch.tensor([5, 30, 16], dtype=torch.int32)
    q, (k, v) = torch.randn(rows, 4, 1, 8), torch.randn(2, rows, 2, 1, 8)
    given = {
        "fastattn": fastattn, "q": q, "k": k, "v": v, "lengths": lengths,
        "block_table": torch.randperm(6, dtype=torch.int32).view(rows, 2),
        "cu_seqlens_q": torch.arange(rows + 1, dtype=torch.int32),
    }  # fmt: skip
    given["k_pages"], given["v_pages"] = torch.randn(2, 6, page, 2, 8)
    exec(step, given)
    alone = given["out"][:, :, 0]
    exec(packed, given | (after := {"q": q[:, :, 0], "lengths": lengths + 1}), after)
    torch.testing.assert_close(after["out"], alone)
