"""Weights in few bits: the codes and scales of each format, to and from float32. Pure arithmetic on arrays."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
