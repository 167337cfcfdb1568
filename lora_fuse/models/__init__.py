"""What is known of model families and of pairs of base and LoRA."""
