"""Laws of recipe."""
