"""Random numbers for dropout. They depend on seed, offset and position, so every tiling and backend draws the
same.

The weight of query i on key j of head h is dropped if a 16-bit number falls below dropout_p * 2**16. That number
is one half of one of the four words that Philox-4x32 gives, after seven rounds, for the key `seed` and the counter
(j // 8, i, h, offset): eight neighbouring keys share a call. Nothing is stored for the backward; it draws them
again.

A state (B, 2) has seed and offset of each batch entry. A state (B, 5) is for tensors that are a part of a whole:
it also says at which head, which query and which eight keys of the whole they begin; see `state_of_part`.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011), section 3.3 and table 2 (seven rounds
pass every test of BigCrush).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.attention.spec import check_dropout
from fastattn.core.workspace import Workspace
from fastattn.ground import arguments

ROUNDS = 7
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_HIGHEST_BITS = 0x8000800080008000 - 2**64


def dropout_state(batch: int, device: torch.device | str | None = None) -> Tensor:
    """A fresh state (batch, 2), seed and offset of each batch entry, from torch's generator of the device.

    `fastattn.attention` draws it if there is a dropout_p and no dropout_state. `torch.manual_seed` and activation
    checkpointing act on it as on any random number.
    """
    batch = arguments.integer("batch", batch, least=0, what="an integer, the number of batch entries")
    device = None if device is None else arguments.device("device", device)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.stack((seed.expand(batch), torch.arange(batch, device=device)), 1)


def state_of_part(state: Tensor, head: int = 0, query: int = 0, key: int = 0) -> Tensor:
    """The state (B, 5) of a part, which begins at this head, query and key of what `state` is for. What is dropped
    of the part is then what would be dropped of it in the whole. key: a multiple of 8."""
    if key % 8:
        raise ValueError(f"key must be a multiple of 8, because eight keys share a draw; got {key}")
    part = state.new_zeros(len(state), 5)
    part[:, : state.shape[1]] = state
    for column, first in ((2, head), (3, query), (4, key // 8)):
        if first:
            part[:, column] += first
    return part


def dropout_mask(state: Tensor, dropout_p: float, heads: int, queries: int, keys: int) -> Tensor:
    """Which weights are kept: bool (B, heads, queries, keys), as every backend draws it; to debug and test.

    Args:
        state: (B, 2) int64, as `dropout_state` gives it; or (B, 5), as `attention` takes it.
        dropout_p: the probability of being dropped; rounded to a multiple of 2**-16. Kept weights are multiplied
            by 1 / (1 - the rounded dropout_p).
    """
    arguments.tensor("state", state)
    if state.dtype != torch.int64:
        raise TypeError(f"state must be int64, got {state.dtype}")
    if state.dim() != 2 or state.shape[1] not in (2, 5):
        raise ValueError(f"state must have shape (batch, 2) or (batch, 5), got {tuple(state.shape)}")
    sizes = (("heads", heads), ("queries", queries), ("keys", keys))
    heads, queries, keys = (arguments.integer(name, value, least=0) for name, value in sizes)
    head = torch.arange(heads, device=state.device)[:, None, None]
    query = torch.arange(queries, device=state.device)[:, None]
    return keep_mask(state[:, None, None, None], head, query, 0, keys, check_dropout(dropout_p))


def keep_mask(
    state: Tensor,
    head: Tensor,
    query: Tensor,
    start: int,
    stop: int,
    dropout_p: float,
    dtype: torch.dtype = torch.bool,
) -> Tensor:
    """Whether the weights on the keys from `start` to before `stop` are kept, as 0 or 1 of this dtype:
    (..., stop - start), leading dimensions as state (..., 1, 2 or 5), head (..., 1) and query (..., 1) broadcast
    to."""
    groups = torch.arange(start // 8, -(-stop // 8), device=state.device)
    return keep_mask_of_groups(groups, state, head, query, dropout_p, dtype)[
        ..., start % 8 : start % 8 + stop - start
    ]


def keep_mask_of_groups(
    groups: Tensor, state: Tensor, head: Tensor, query: Tensor, dropout_p: float, dtype: torch.dtype
) -> Tensor:
    """Whether the weights on the keys of some groups (..., G) are kept, group g being the keys 8 g to 8 g + 7:
    (..., 8 G), leading dimensions as all arguments broadcast to."""
    seed, offset, *begin = state.unbind(-1)
    if begin:
        head, query, groups = (first + t for first, t in zip(begin, (head, query, groups), strict=True))
    words = torch.broadcast_tensors(*philox((groups, query, head, offset), seed))
    # Two words side by side hold four 16-bit numbers. They are unsigned, int16 is signed: flipping the highest bit
    # makes it compare them in the same order.
    pairs = torch.stack((words[0] | words[1] << 32, words[2] | words[3] << 32), -1).bitwise_xor_(_HIGHEST_BITS)
    # On a CPU, comparing in place, converting and multiplying take a fifth of the time of a bool and masked_fill.
    return pairs.view(torch.int16).flatten(-2).ge_(round(dropout_p * 2**16) - 2**15).to(dtype)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32: four random 32-bit words for each counter, held in int64; arguments and results broadcast.

    Each word is only as large as the words that it depends on. If each number of the counter varies along one
    dimension only, nothing is computed repeatedly in the first two rounds and half of the third.
    """
    c0, c1, c2, c3 = (c & _WORD for c in counter)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(rounds):
        # Products wrap around at 64 bits; both of their halves are right all the same. The lower half is masked
        # only where a product needs it.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((second >> 32) ^ (c1 ^ k0)) & _WORD
        c2 = ((first >> 32) ^ (c3 ^ k1)) & _WORD
        c1, c3 = second, first
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


class KeepMasks:
    """The keep masks of one call, block by block, in the memory of a workspace.

    What depends on the row or on the column alone is computed once, for all blocks. From the third round of Philox
    on, words depend on both, and are computed in place: new memory for each would take as long as the computation.
    """

    BYTES = 8  # of workspace for each weight, beside the mask

    def __init__(self, state: Tensor, sizes: tuple[int, int, int], dropout_p: float, workspace: Workspace) -> None:
        """For a state (B, 2 or 5) and so many heads, queries and keys."""
        self.workspace, self.threshold = workspace, round(dropout_p * 2**16) - 2**15
        heads, queries, keys = sizes
        whole = F.pad(state, (0, 5 - state.shape[1]))  # a state of two numbers begins at 0
        seed, offset, *begin = (t[:, None, None, None] for t in whole.unbind(1))
        head = begin[0] + torch.arange(heads, device=state.device)[:, None, None]
        query = begin[1] + torch.arange(queries, device=state.device)[:, None]
        group = begin[2] + torch.arange(-(-keys // 8), device=state.device)
        steps = torch.arange(ROUNDS, device=state.device)
        self.keys = tuple(
            half[..., None] + steps * weyl & _WORD for half, weyl in zip((seed, seed >> 32), _WEYL, strict=True)
        )
        k0, k2, k1, k3 = (keys[..., i] for keys in self.keys for i in (0, 1))
        by_row, by_column = (
            head * _MULTIPLIERS[1] >> 32 ^ query ^ k0,
            group * _MULTIPLIERS[0] >> 32 ^ offset & _WORD ^ k1,
        )
        # After two rounds the third word is that of a row, xor that of a column.
        self.odd_words = by_column * _MULTIPLIERS[1], by_row * _MULTIPLIERS[0]
        self.first = (self.odd_words[0] >> 32 ^ head * _MULTIPLIERS[1] ^ k2) & _WORD
        self.third = (self.odd_words[1] >> 32 ^ k3) & _WORD, group * _MULTIPLIERS[0] & _WORD

    def of(self, batch: slice, heads: slice, rows: slice, columns: slice) -> Tensor:
        """1 for weights that are kept, else 0, in the workspace's dtype: (batch, heads, rows, columns)."""
        groups = slice(columns.start // 8, -(-columns.stop // 8))
        place = batch, heads, rows
        c0, c1, c3 = (
            self.first[batch, heads, :, groups],
            self.odd_words[0][batch, :, :, groups],
            self.odd_words[1][place],
        )
        of_rows, of_columns = self.third[0][place], self.third[1][batch, ..., groups]
        shape = (*of_rows.shape[:3], of_columns.shape[3])
        names = ("c0", "c2", "first", "second", "first, next", "second, next")
        c0_memory, c2_memory, *products = (self._memory(name, shape) for name in names)
        c2 = torch.bitwise_xor(of_rows, of_columns, out=c2_memory)
        for i, (k0, k1) in enumerate(zip(*(keys[batch, ..., 2:].unbind(-1) for keys in self.keys), strict=True)):
            products = products[2:] + products[:2]  # those of the round before are still read
            first, second = products[:2]
            second = torch.mul(c2, _MULTIPLIERS[1], out=second)
            if i == 0:
                # The other product, and what is xored, are of a row or of a column alone.
                first = c0 * _MULTIPLIERS[0]
                c0 = torch.bitwise_right_shift(second, 32, out=c0_memory).bitwise_xor_(c1 ^ k0)
                torch.bitwise_xor(first >> 32 ^ k1, c3, out=c2)
            else:
                first = torch.mul(c0, _MULTIPLIERS[0], out=first)
                torch.bitwise_right_shift(second, 32, out=c0).bitwise_xor_(c1.bitwise_xor_(k0))
                torch.bitwise_right_shift(first, 32, out=c2).bitwise_xor_(c3.bitwise_xor_(k1))
            c1, c3 = second, first
            c0.bitwise_and_(_WORD)
            c2.bitwise_and_(_WORD)
        pairs = self._memory("pairs", (*shape, 2))
        torch.bitwise_or(c0, c1.bitwise_left_shift_(32), out=pairs[..., 0])
        torch.bitwise_or(c2, c3.bitwise_left_shift_(32), out=pairs[..., 1])
        kept = pairs.bitwise_xor_(_HIGHEST_BITS).view(torch.int16).flatten(-2).ge_(self.threshold)
        keep = self.workspace.empty("keep", *kept.shape).copy_(kept)
        return keep[..., columns.start % 8 : columns.start % 8 + columns.stop - columns.start]

    def _memory(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.workspace.empty(name, *shape, dtype=torch.int64)
