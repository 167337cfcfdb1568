"""Calls of a pipeline: their arguments, the prompts that are encoded apart, the clips that come out."""
