"""A merged checkpoint in other formats."""
