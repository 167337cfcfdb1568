"""The fuse: planned from headers, streamed piece by piece, the exact sum rounded once."""
