"""Looking inside: what heads do, computed in the fused pass's O(N) memory."""

from fastattn.lens.adapters import Adapter, Family, Projections, adapt, families, register
from fastattn.lens.heads import HeadScores, even_scores, head_scores, model_head_scores
from fastattn.lens.watching import Seen, watch

__all__ = [
    "Adapter",
    "Family",
    "HeadScores",
    "Projections",
    "Seen",
    "adapt",
    "even_scores",
    "families",
    "head_scores",
    "model_head_scores",
    "register",
    "watch",
]
