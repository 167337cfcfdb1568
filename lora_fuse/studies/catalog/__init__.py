"""The catalog of variants: lineage, state, verdict, pictures and place of each."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
