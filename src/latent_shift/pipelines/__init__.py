"""From a checkpoint and a prompt to a clip: loading, conditioning, sampling."""
