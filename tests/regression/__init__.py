"""Laws of regression."""
