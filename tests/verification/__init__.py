"""Laws of verification."""
