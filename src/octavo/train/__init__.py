"""Training: one loop, one optimizer on flat buffers, and the choice of what to keep and what to recompute."""
