"""Training runs: batches to a checkpoint. All but the loops knows no framework."""
