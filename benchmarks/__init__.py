"""Costs of a fuse, a download, a publication, a sweep: measured at real shapes, by tools that make them repeatable."""
