"""The model families that are known, and the pairs of base and LoRA that do not fit."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
