"""Laws of studies."""
