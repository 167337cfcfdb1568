"""Published checkpoints made again, and statements on that."""
