"""Laws of exports."""
