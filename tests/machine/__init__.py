"""Laws of machine."""
