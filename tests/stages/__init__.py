"""Laws of stages."""
