"""Laws of hub."""
