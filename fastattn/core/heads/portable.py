"""The definition is what is wanted of heads: row by row, O(N) memory."""

from fastattn.core.heads.definition import backward, forward

__all__ = ["backward", "forward"]
