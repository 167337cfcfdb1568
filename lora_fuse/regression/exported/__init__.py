"""Exports judged: the weights that a file gives back, and the pictures that they make, against the merge.

`weight_noise` measures a matrix, `measured_export` a file; `export_verdicts` decides; `export_table` shows it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
