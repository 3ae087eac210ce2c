"""Looking inside: what heads do, computed in the fused pass's O(N) memory."""

from fastattn.lens.adapters import Adapter, Family, Projections, adapt, families, register
from fastattn.lens.attribution import Attribution, attribution
from fastattn.lens.heads import HeadScores, even_scores, head_scores, model_head_scores
from fastattn.lens.logit_lens import LogitLens, TunedLens, logit_lens
from fastattn.lens.watching import Seen, watch

__all__ = [
    "Adapter",
    "Attribution",
    "Family",
    "HeadScores",
    "LogitLens",
    "Projections",
    "Seen",
    "TunedLens",
    "adapt",
    "attribution",
    "even_scores",
    "families",
    "head_scores",
    "logit_lens",
    "model_head_scores",
    "register",
    "watch",
]
