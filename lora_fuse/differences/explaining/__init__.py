"""The content of a checkpoint, asked of its base and of LoRAs: how much differs, at which scales, and what is left."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
