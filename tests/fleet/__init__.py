"""Laws of the fleet."""
