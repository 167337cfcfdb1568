"""Machines beside this one: jobs run on the nodes of a Ray cluster, and their results come back whole or not at all.

Ray places a job by the GPU, memory and disk that it asks for, runs it again where its node died, and shows it on its
dashboard. A refusal is a job's result, and is not tried again.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
