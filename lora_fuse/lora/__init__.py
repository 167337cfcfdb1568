"""A LoRA file: its keys, its factors, and the deltas that they make."""
