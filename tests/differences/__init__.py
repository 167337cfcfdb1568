"""Laws of differences between a checkpoint and its base."""
