"""How a training step scales over GPUs that share one sequence: predicted, for sizes that cannot be run here."""
