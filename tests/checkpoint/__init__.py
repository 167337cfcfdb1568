"""Laws of checkpoint."""
