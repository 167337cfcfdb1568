"""Is a new version of a LoRA a good one: it has to change pictures, so no golden can say it.

`files` compares the two files, `effect` what they do to pictures; `sides` renders and measures, which gives the
`evidence`; `questions` are asked of it, and `judgement` decides. `report` and `junit` show it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
