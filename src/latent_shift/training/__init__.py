"""Training: the loop, its stages and objectives, preparation and checks, checkpoints, memory."""
