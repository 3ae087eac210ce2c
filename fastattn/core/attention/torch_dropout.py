"""The random numbers of dropout on a GPU in one launch: a C++ function that PyTorch compiles for elementwise use.

In PyTorch's operators Philox takes some seventy launches, and each goes through memory. PyTorch's jiterator makes
one kernel of it. It is in beta, so it is tried first: where it does not give the very bits of
fastattn.core.attention.dropout, the operators do the work, and the log says so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.core.attention.dropout import ROUNDS, KeepMasks, dropout_mask
from fastattn.ground.modes import capturing, kept, outside_modes

# Numbers come as doubles, which hold 32 bits exactly. The weight of a key is in one half of one of four words.
CODE = """
template <typename T>
T keep_weight(T query, T key, T head, T offset, T low, T high, T threshold) {
  typedef unsigned int word;
  typedef unsigned long long product;
  word c0 = (word)key / 8, c1 = (word)query, c2 = (word)head, c3 = (word)offset;
  word k0 = (word)low, k1 = (word)high;
  for (int round = 0; round < ROUNDS; ++round) {
    product first = (product)0xD2511F53u * c0, second = (product)0xCD9E8D57u * c2;
    c0 = (word)(second >> 32) ^ c1 ^ k0;
    c2 = (word)(first >> 32) ^ c3 ^ k1;
    c1 = (word)second;
    c3 = (word)first;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  int place = (word)key % 8;
  word chosen = place < 2 ? c0 : place < 4 ? c1 : place < 6 ? c2 : c3;
  word number = (chosen >> (place % 2 * 16)) & 0xFFFFu;
  return number >= (word)threshold ? T(1) : T(0);
}
""".replace("ROUNDS", str(ROUNDS))

log = logging.getLogger("fastattn")
_known: dict[torch.device, bool] = {}


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.cuda.jiterator._create_jit_fn(CODE, threshold=0.0)


class FusedKeepMasks:
    """As KeepMasks, with one launch for each block and without a workspace."""

    BYTES = 0

    def __init__(self, state: Tensor, sizes: tuple[int, int, int], dropout_p: float, _: object = None) -> None:
        self.threshold = float(round(dropout_p * 2**16))
        seed, offset, *begin = state.unbind(1)
        words = torch.stack((offset, seed, seed >> 32, *begin)) & 0xFFFFFFFF
        self.words = words.double()[..., None, None, None].unbind()
        self.places = _places(max(sizes), state.device)

    def of(self, batch: slice, heads: slice, rows: slice, columns: slice) -> Tensor:
        """1 for weights that are kept, else 0, float64: (batch, heads, rows, columns)."""
        query, key, head = self.places[rows, None], self.places[columns], self.places[heads, None, None]
        offset, low, high, *begin = (t[batch] for t in self.words)
        if begin:
            head, query, key = begin[0] + head, begin[1] + query, 8 * begin[2] + key
        return _compiled()(query, key, head, offset, low, high, threshold=self.threshold)


@kept(8)
def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.float64, device=device)


def masks_of(device: torch.device) -> type[KeepMasks] | type[FusedKeepMasks]:
    """How keep masks are made on this device."""
    if device.type != "cuda" or not (torch.version.cuda or torch.version.hip):
        return KeepMasks
    if device not in _known:
        if capturing():
            return KeepMasks  # a compilation and a comparison, which a graph cannot hold
        _known[device] = _agrees(device)
    return FusedKeepMasks if _known[device] else KeepMasks


def _agrees(device: torch.device) -> bool:
    """Whether the compiled function gives the bits of the definition, tried on a few thousand weights."""
    with outside_modes():
        try:
            state = torch.tensor(
                [[-(2**62) - 12345, 2**33 + 7, 0, 2**20, 3], [2**63 - 1, 0, 9, 0, 0]], device=device
            )
            sizes, dropout_p = (3, 37, 70), 0.3
            found = FusedKeepMasks(state, sizes, dropout_p).of(*map(slice, (2, *sizes)))
            wrong = "" if torch.equal(found.bool(), dropout_mask(state, dropout_p, *sizes)) else "its bits differ"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
    if wrong:
        log.warning("PyTorch's jiterator is not used for dropout on %s: %s", device, wrong)
    return not wrong
