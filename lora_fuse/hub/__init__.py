"""Transfers from and to a Hub: bases and LoRAs pinned and fetched, a merged checkpoint published.

Imports run one way. Download: `locks`, `sizes` → `repository` → `transfer` → `leftovers`. Publication: `publisher` →
`pull_request` → `remote`, `payload`. Both: → `worker_process` → `retry` → `error_texts` → `client` → `wire`. `worker`
is the process in which the client itself transfers; nothing imports it.

Invariants: no pickle is ever fetched; a lock that exists keeps its commit, however far its branch moves, unless it
is told to move; a source that is locked and whole on this machine needs no network; the token comes from `HF_TOKEN`
and nowhere else; no answer is used that no Hub gives; a question ends in its time, and a transfer that hardly moves.

`streaming` reads weights from the Hub while a fuse goes on: they never lie on this machine.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
