"""Search for the layers that an export keeps: the least error at a size.

`layer_choice` chooses, of numbers alone; `searching` measures layers and renders what they do.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
