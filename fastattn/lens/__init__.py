"""Looking inside: what heads do, computed in the fused pass's O(N) memory."""

from fastattn.lens.heads import HeadScores, even_scores, head_scores, model_head_scores

__all__ = ["HeadScores", "even_scores", "head_scores", "model_head_scores"]
