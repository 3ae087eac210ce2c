"""Looking inside: what heads do, computed in the fused pass's O(N) memory."""

from fastattn.lens.heads import HeadScores, head_scores, model_head_scores

__all__ = ["HeadScores", "head_scores", "model_head_scores"]
