"""The golden-image regression: is a merged checkpoint's picture the one that base and LoRA give, and the approved one?

`render` makes pictures, `pairs` renders merged and unfused in one process, `metrics` measures, `verdicts` decides,
`goldens` keeps what was approved, `exported` judges exports, `review` and `report` show it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
