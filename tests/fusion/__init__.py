"""Laws of fusion."""
