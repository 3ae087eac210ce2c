"""fastattn: fused attention and MLP for PyTorch, exact, drop-in, open to look into."""

from fastattn.functional import attention, attention_backward, merge_states

__version__ = "0.1.0"

__all__ = ["attention", "attention_backward", "merge_states"]
