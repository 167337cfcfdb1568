"""A base or merged checkpoint on disk: headers, shards, blocks, and what a diffusers repository holds."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
