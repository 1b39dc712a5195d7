"""Read, check, pack and encode captioned videos for training."""
