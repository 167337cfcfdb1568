"""Judges a new version of a LoRA: it has to change pictures, so no golden can tell if it is a good one.

`file_comparison` compares the two files, `effect` their effects on pictures; `sides` renders and measures the evidence;
`questions` are asked of it, and `judgement` decides. `validation_report` and `junit` show it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
