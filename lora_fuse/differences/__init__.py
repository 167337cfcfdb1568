"""A checkpoint held against its base: what differs, which LoRAs are in it, and what of them can be taken out again."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
