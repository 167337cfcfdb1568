"""A Hugging Face Hub on the loopback interface, for tests: what `huggingface_hub` 2.4 and `hf-xet` 1.8 call.

Repositories, trees, commits, pull requests, LFS, Xet and `resolve` behave as the client expects; faults are
rules on requests (`faults.py`), and every request is logged. Nothing leaves the machine or needs an account.
"""

from tests.hub_server.faults import Call, Fault
from tests.hub_server.model import Commit, Entry, Repo
from tests.hub_server.server import LoopbackHub

__all__ = ["Call", "Commit", "Entry", "Fault", "LoopbackHub", "Repo"]
