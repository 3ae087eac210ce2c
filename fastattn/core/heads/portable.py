"""The definition of the heads' preparation serves as its portable backend: it takes O(N) memory."""

from fastattn.core.heads.definition import backward, forward

__all__ = ["backward", "forward"]
