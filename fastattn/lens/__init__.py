"""Looking inside: what heads do, computed in the fused pass's O(N) memory."""

from fastattn.core.statistics.functional import attention_statistics, gather_weights, match_mass
from fastattn.core.statistics.spec import Matches, TopKeys
from fastattn.lens.adapters import Adapter, Projections, adapt
from fastattn.lens.attribution import Attribution, attribution
from fastattn.lens.causal_trace import CausalTrace, causal_trace
from fastattn.lens.family_table import Family, families, register
from fastattn.lens.head_report import HeadReport, head_report
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
from fastattn.lens.neurons import Firing, Neuron, Neurons, neurons
from fastattn.lens.rollout import Rollout, rollout
from fastattn.lens.seen import Seen
from fastattn.lens.watching import watch
from fastattn.lens.weights import VirtualWeights, composition, copying_scores, virtual_weights

__all__ = [
    "Adapter",
    "Attribution",
    "CausalTrace",
    "Family",
    "Firing",
    "HeadReport",
    "HeadScores",
    "LogitLens",
    "Matches",
    "Neuron",
    "Neurons",
    "Projections",
    "Rollout",
    "Seen",
    "TopKeys",
    "TunedLens",
    "VirtualWeights",
    "ablate",
    "adapt",
    "attention_statistics",
    "attribution",
    "causal_trace",
    "composition",
    "copying_scores",
    "even_scores",
    "families",
    "gather_weights",
    "head_report",
    "head_scores",
    "knock_out",
    "logit_lens",
    "match_mass",
    "model_head_scores",
    "neurons",
    "patch_activations",
    "patch_pattern",
    "path_patch",
    "register",
    "rollout",
    "scale_heads",
    "steer",
    "virtual_weights",
    "watch",
]
