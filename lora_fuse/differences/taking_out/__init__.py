"""Taken out of a checkpoint: a difference from its base as a LoRA, and LoRAs that were merged into it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
