"""A published checkpoint made again from its base and LoRAs, byte for byte, and statements of those who did that.

`published_recipe` reads what a repository says of how it was made, `made_again` fuses it and compares every sha256,
`attestation` is a signed statement on that, and `rebuilders` counts such statements.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
