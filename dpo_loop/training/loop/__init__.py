"""The one training loop: micro-batches, held-out pairs, alarms, checkpoints, exact resume."""
