"""Laws of the formats of weights in few bits."""
