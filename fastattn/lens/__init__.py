"""Looking inside: what heads do, computed in the fused pass's O(N) memory."""

from fastattn.core.statistics.functional import attention_statistics, gather_weights, match_mass
from fastattn.core.statistics.spec import Matches, TopKeys
from fastattn.lens.adapters import Adapter, Family, Projections, adapt, families, register
from fastattn.lens.attribution import Attribution, attribution
from fastattn.lens.heads import HeadScores, even_scores, head_scores, model_head_scores
from fastattn.lens.interventions import (
    ablate,
    knock_out,
    patch_activations,
    patch_pattern,
    path_patch,
    scale_heads,
    steer,
)
from fastattn.lens.logit_lens import LogitLens, TunedLens, logit_lens
from fastattn.lens.watching import Seen, watch

__all__ = [
    "Adapter",
    "Attribution",
    "Family",
    "HeadScores",
    "LogitLens",
    "Matches",
    "Projections",
    "Seen",
    "TopKeys",
    "TunedLens",
    "ablate",
    "adapt",
    "attention_statistics",
    "attribution",
    "even_scores",
    "families",
    "gather_weights",
    "head_scores",
    "knock_out",
    "logit_lens",
    "match_mass",
    "model_head_scores",
    "patch_activations",
    "patch_pattern",
    "path_patch",
    "register",
    "scale_heads",
    "steer",
    "watch",
]
