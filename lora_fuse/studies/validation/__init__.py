"""Judges a new version of a LoRA: it has to change pictures, so no golden can tell if it is a good one.

`file_comparison` compares the two files; `sides` renders and measures their effects on pictures; `questions` are asked
of that evidence and decide; `validation_report` shows it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
