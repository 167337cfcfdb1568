"""Laws of pocket."""
