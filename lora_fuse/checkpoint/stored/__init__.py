"""Weights that are stored as something else than themselves: containers, and the values that codes stand for."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
