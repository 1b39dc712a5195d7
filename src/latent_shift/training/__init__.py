"""The training loop, its stages and objectives, checkpoints, memory."""
