"""Merges whose tensors have other dtypes than the base's: codes that are decoded, floats that are converted."""
