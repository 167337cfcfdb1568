"""Laws of project."""
