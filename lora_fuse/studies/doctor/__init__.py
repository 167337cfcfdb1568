"""Checks that a recipe fits a machine, before anything is fetched or written; each gives a `Finding`.

Checks are functions of what was read, so that they can be given any reading; `examination` reads, and asks them all.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
