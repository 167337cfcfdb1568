"""Sweeps: the same model built at several points (scales, LoRAs), each looked at, compared and thrown away again.

Imports run one way: `running` and `building` touch files and models; `recommendation`, `curves`, `numbers` and `sheet`
are of numbers and text.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
