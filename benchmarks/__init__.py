"""What it costs to fuse: measurements at real shapes, and the tools that make them repeatable."""
