"""Laws of release."""
