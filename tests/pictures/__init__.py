"""Laws of pictures."""
