"""Which keys each query sees, as small immutable values that combine with & | ~.

>>> mask = causal() & window(512) | global_tokens([0])
>>> mask
causal & window(512) | global_tokens([0])
>>> seen = mask.dense(1, 1, 1024, 1024)

A mask is a rule, not a tensor: it applies to any length, unless a part of it lists positions. Query i stands on
the diagonal at key i + Lk - Lq (bottom-right alignment). A mask is defined by `sees`, a predicate over positions.
`states` answers the same question for blocks of 64 x 64 pairs (granules) at once, so that few pairs must be
looked at one by one. `lower` turns a mask into what the kernels read: see `fastattn.masks.lists`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastattn.ground import arguments
from fastattn.ground.checks import check_side, check_window
from fastattn.ground.modes import lasts, outside_modes
from fastattn.masks.algebra import Mask, Values
from fastattn.masks.block_kinds import BigBird, Blocks, HuggingFaceBigBird
from fastattn.masks.kinds import (
    Dense,
    Dilated,
    Documents,
    Function,
    GlobalTokens,
    Lengths,
    PackedSequences,
    Window,
)
from fastattn.masks.lists import GRANULE, BlockLists, Lowered, decode

INTEGERS = (torch.int32, torch.int64)

__all__ = [
    "GRANULE",
    "BlockLists",
    "Lowered",
    "Mask",
    "bigbird",
    "blocks",
    "causal",
    "decode",
    "dilated",
    "documents",
    "from_dense",
    "from_function",
    "global_tokens",
    "key_lengths",
    "longformer",
    "packed_sequences",
    "prefix",
    "window",
]


def causal(*, align: str = "bottom-right") -> Mask:
    """Keys up to the diagonal.

    Args:
        align: "bottom-right", where the last query stands at the last key, or "top-left", where query i stands at
            key i. They differ where there are more keys than queries, or fewer.
    """
    return Window(None, 0, _is_top_left(align))


def window(left: int | None = None, right: int | None = None, *, align: str = "bottom-right") -> Mask:
    """Keys from `left` before the diagonal to `right` after it, both included; None is unbounded.

    A causal sliding window of 512 keys before the query, and itself, is `causal() & window(512)`.

    Args:
        align: as `causal`'s.
    """
    return Window(check_side("left", left), check_side("right", right), _is_top_left(align))


def _is_top_left(align: str) -> bool:
    arguments.choice("align", align, ("bottom-right", "top-left"))
    return align == "top-left"


def key_lengths(lengths: Tensor | Sequence[int]) -> Mask:
    """The first `lengths[b]` keys of batch element b: padding on the right is not seen.

    Args:
        lengths: (B,), int32 or int64. Lengths beyond Lk count as Lk, negative ones as 0.
    """
    return Lengths(_lengths(lengths), "key_lengths")


def prefix(lengths: int | Tensor | Sequence[int]) -> Mask:
    """The first keys: `lengths[b]` of batch element b, or the same number in every batch element.

    A prefix language model, which sees its prefix in both directions, is `causal() | prefix(lengths)`.
    """
    if not isinstance(lengths, Iterable) or getattr(lengths, "shape", None) == ():
        lengths = [arguments.integer("lengths", lengths, what="an integer, a tensor or a sequence of integers")]
    return Lengths(_lengths(lengths), "prefix")


def documents(
    ids: Tensor | Sequence[int] | None = None, *, cu_seqlens: Tensor | Sequence[int] | None = None
) -> Mask:
    """Keys of the same document as the query's: several documents in one sequence do not see each other.

    If there are fewer queries than keys, the queries are the last Lq tokens.

    Args:
        ids: which document each key is from, integers (Lk,) or (B, Lk), in any order (sorted is fastest).
        cu_seqlens: instead of ids: the first token of each document, and the end, (documents + 1,), from 0 up to
            Lk. Its values are read here; on a GPU that waits for the device.
    """
    if (ids is None) == (cu_seqlens is None):
        raise TypeError("documents takes either ids or cu_seqlens")
    if ids is not None:
        return Documents(Values(_integers("ids", ids, "(Lk,) or (B, Lk)", dims=(1, 2))), boundaries=False)
    return Documents(Values(_cu_seqlens("cu_seqlens", cu_seqlens, "documents")), boundaries=True)


def packed_sequences(
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    causal: bool = False,
    window: int | Sequence[int | None] | Tensor | None = None,
    *,
    key_lengths: Tensor | Sequence[int] | None = None,
    align: str = "bottom-right",
) -> PackedSequences:
    """Keys of the query's own sequence. The sequences lie one after another; each may have any number of queries
    and of keys, also none.

    Args:
        cu_seqlens_q, cu_seqlens_k: the first query and the first key of each sequence, and the end: (sequences +
            1,), from 0 up to Lq and Lk. Their values are read here; on a GPU that waits for the device.
        causal, window: as `attention`'s, counted from each sequence's own diagonal: its last query stands at its
            last key.
        key_lengths: (sequences,), how many keys of each sequence exist, if cu_seqlens_k reserves room for more (a
            cache). The unused room is not seen, and the last query stands at the last existing key.
        align: "bottom-right", as above, or "top-left": the first query of a sequence stands at its first key.
    """
    queries = _cu_seqlens("cu_seqlens_q", cu_seqlens_q, "sequences")
    keys = _cu_seqlens("cu_seqlens_k", cu_seqlens_k, "sequences")
    if len(queries) != len(keys):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must have the same number of sequences, "
            f"got {len(queries) - 1} and {len(keys) - 1}"
        )
    left, right = check_window(window)
    right = 0 if arguments.flag("causal", causal) else right
    if key_lengths is not None:
        queries, keys = _without_rest(queries, keys, key_lengths)
    return PackedSequences(Values(queries), Values(keys), left, right, _is_top_left(align))


def _without_rest(queries: Tensor, keys: Tensor, key_lengths: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
    """cu_seqlens in which the unused room of each sequence becomes one more sequence, without queries."""
    lengths = _read("key_lengths", _integers("key_lengths", key_lengths, "(sequences,)", dims=(1,)))
    with outside_modes():
        room = keys.diff()
        if len(lengths) != len(room) or bool((lengths > room).any()):
            raise ValueError(
                f"key_lengths must have shape ({len(room)},), each at most the room for its sequence's keys, "
                f"{_shortened(room)}; got {_shortened(lengths)}"
            )
        ends = torch.stack((keys[:-1] + lengths, keys[1:]), 1).flatten().to(keys.dtype)
        return torch.cat((queries[:1], queries[1:].repeat_interleave(2))), torch.cat((keys[:1], ends))


def global_tokens(positions: Tensor | Iterable[int]) -> Mask:
    """Global tokens see all keys and all queries see them (Longformer, Beltagy et al. 2020, section 3.1).

    Args:
        positions: key positions (n,), integers; or flags, bool (Lk,) or (B, Lk). If there are fewer queries than
            keys, the queries are the last Lq tokens.
    """
    return _global_tokens("positions", positions)


def _global_tokens(name: str, positions: Tensor | Iterable[int]) -> Mask:
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        arguments.tensor(name, positions)
        if positions.dim() not in (1, 2):
            raise ValueError(f"{name} must have shape (n,), (Lk,) or (B, Lk), got {tuple(positions.shape)}")
        return GlobalTokens(Values(positions))
    return GlobalTokens(Values(_read(name, _integers(name, positions, "(n,)", dims=(1,)))))


def dilated(step: int) -> Mask:
    """Keys at multiples of `step` from the diagonal, before and after it."""
    return Dilated(arguments.integer("step", step, least=1))


def blocks(grid: Tensor, block: int = GRANULE) -> Mask:
    """Square blocks of `block` tokens.

    Args:
        grid: (Lq / block, Lk / block), rounded up, with or without (B, H) in front, each possibly 1. Bool; or
            integers, how often a block's keys count in the softmax: such a mask combines with & only.
    """
    block = arguments.integer("block", block, least=1)
    _check_tensor("grid", grid, (torch.bool, torch.uint8, *INTEGERS))
    if grid.dim() not in (2, 3, 4):
        raise ValueError(f"grid must have 2 to 4 dimensions ([[B,] H,] rows, columns), got {tuple(grid.shape)}")
    if grid.dtype == torch.bool:
        return Blocks(Values(grid), block, False)
    _read("grid", grid)
    return Blocks(Values(grid), block, True)


def bigbird(
    block: int = GRANULE,
    random: int = 3,
    *,
    global_blocks: int = 1,
    window_blocks: int = 3,
    seed: int = 0,
    style: str = "paper",
    per_head: bool = False,
    training: bool = False,
    max_positions: int = 4096,
) -> Mask:
    """BigBird's sparse attention (Zaheer et al. 2020), self-attention only.

    Args:
        block: tokens in a block.
        random: random blocks for each row of blocks, drawn from those that it does not see anyway.
        global_blocks: this many blocks at the beginning and at the end see all keys and are seen by all queries.
        window_blocks: blocks seen around the diagonal, odd.
        seed: of the random blocks. In the style of huggingface, the layer's index.
        style: "paper", or "huggingface": exactly what `transformers`' BigBird computes, in which a key may count
            several times in the softmax; window_blocks and global_blocks are 3 and 1 there, and random blocks
            differ by head. Such a mask combines with & only.
        per_head: in the style of the paper, whether heads draw their own random blocks.
        training: in the style of huggingface. In eval mode its random blocks are all block 0, which then counts
            1 + random times.
        max_positions: in the style of huggingface, the model's `max_position_embeddings`.
    """
    block, random, seed = (
        arguments.integer(name, value, least=least)
        for name, value, least in (("block", block, 1), ("random", random, 0), ("seed", seed, 0))
    )
    global_blocks = arguments.integer("global_blocks", global_blocks, least=0)
    window_blocks = arguments.integer("window_blocks", window_blocks, least=1)
    max_positions = arguments.integer("max_positions", max_positions, least=1)
    per_head, training = arguments.flag("per_head", per_head), arguments.flag("training", training)
    arguments.choice("style", style, ("paper", "huggingface"))
    if window_blocks % 2 == 0:
        raise ValueError(f"window_blocks must be odd, got {window_blocks}")
    if style == "paper":
        return BigBird(block, random, global_blocks, window_blocks, seed, per_head)
    if (global_blocks, window_blocks) != (1, 3):
        raise ValueError(
            "in the style of huggingface, global_blocks must be 1 and window_blocks 3, "
            f"got {global_blocks} and {window_blocks}"
        )
    return HuggingFaceBigBird(block, random, seed, training, max_positions)


def longformer(window: int, global_positions: Tensor | Iterable[int] = ()) -> Mask:
    """A window of `window` / 2 keys on either side, and global tokens (Beltagy et al. 2020).

    Args:
        window: even, as a Longformer's `attention_window`.
        global_positions: as `global_tokens` takes them.
    """
    window = arguments.integer("window", window, least=0)
    if window % 2:
        raise ValueError(f"window must be even, got {window}")
    return Window(window // 2, window // 2) | _global_tokens("global_positions", global_positions)


def from_function(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Mask:
    """The mask that a predicate defines.

    Args:
        function: called with the batch, head, query and key of one pair, int64 tensors of shape (); returns a bool
            tensor of shape (), as flex_attention's mask_mods do. torch.vmap calls it for many pairs at once; where
            torch.vmap fails, it is called with tensors that broadcast against each other. It is evaluated for each
            batch element or head only if its result depends on them, on the device that the mask is lowered for, a
            few megabytes at a time. Masks from the same function are equal: pass the same function again to use
            its lists again. Write conditions with & | ~ and torch.where, not with Python's and, or, not, if.

    Raises:
        TypeError, ValueError: when it is evaluated, naming the function: it fails, or returns something else.
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__name__}")
    return Function(function)


def from_dense(seen: Tensor) -> Mask:
    """The mask that a tensor holds.

    Args:
        seen: bool (Lq, Lk), (H, Lq, Lk) or (B, H, Lq, Lk), B and H possibly 1; True where a query may see a key.
    """
    _check_tensor("seen", seen, (torch.bool,))
    if seen.dim() not in (2, 3, 4):
        raise ValueError(f"seen must have 2 to 4 dimensions ([[B,] H,] Lq, Lk), got {tuple(seen.shape)}")
    return Dense(Values(seen))


def _check_tensor(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    arguments.tensor(name, t)
    if t.dtype not in dtypes:
        raise TypeError(
            f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {t.dtype}"
        )


def _lengths(lengths: Tensor | Sequence[int]) -> Values:
    return Values(_integers("lengths", lengths, "(B,)", dims=(1,)))


def _integers(name: str, values: Tensor | Iterable[int] | None, shape: str, dims: tuple[int, ...]) -> Tensor:
    """`values` as an integer tensor; its number of dimensions must be in `dims`."""
    if not isinstance(values, Tensor):
        with outside_modes():
            values = arguments.integers(name, values)
    _check_tensor(name, values, INTEGERS)
    if values.dim() not in dims:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(values.shape)}")
    return values


def _cu_seqlens(name: str, starts: Tensor | Sequence[int] | None, of: str) -> Tensor:
    """The first token of each sequence, and the end, checked and on the CPU."""
    starts = _integers(name, starts, f"({of} + 1,)", dims=(1,))
    _must_be_readable(name, starts)
    with outside_modes():
        starts = starts.cpu()
        if not len(starts) or int(starts[0]) != 0 or bool((starts.diff() < 0).any()):
            raise ValueError(f"{name} must begin with 0 and be sorted, got {_shortened(starts)}")
    return starts


def check_cu_seqlens(name: str, starts: Tensor | Sequence[int], tokens: int) -> None:
    """Raise unless `starts` are boundaries of sequences with at most `tokens` tokens in all."""
    end = int(_cu_seqlens(name, starts, "sequences")[-1])
    if end > tokens:
        raise ValueError(f"{name} ends with {end}, expected at most {tokens} tokens")


def _read(name: str, values: Tensor) -> Tensor:
    """The values on the CPU. Raise if one is negative."""
    _must_be_readable(name, values)
    with outside_modes():
        values = values.cpu()
        if values.numel() and int(values.min()) < 0:
            raise ValueError(f"{name} must not be negative, got {int(values.min())}")
    return values


def _must_be_readable(name: str, values: Tensor) -> None:
    if not lasts(values) or values.is_meta:
        raise ValueError(
            f"{name} must have values that can be read, got a tensor that is fake, meta or within torch.func"
        )


def _shortened(values: Tensor) -> str:
    shown = ", ".join(map(str, values[:8].tolist()))
    return f"[{shown}, ...]" if len(values) > 8 else f"[{shown}]"
