"""Training objectives, pure functions of per-token log-probabilities; `xp` is the array namespace of a framework."""
