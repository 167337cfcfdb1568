"""A base or merged checkpoint on disk: headers, shards, blocks, and what a diffusers repository holds."""
