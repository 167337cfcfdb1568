"""The catalog of variants: what each is made of, whether it is built and right, what it looks like, where it is."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
