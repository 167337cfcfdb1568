"""Release of a merged checkpoint: card, licences, provenance, bill of materials, signature, and their check."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
