"""Bases and LoRAs pinned: a Hub repository at a commit, or a local folder, with every file's sha256.

The Hub client trusts its cache and the wire, so a lock is only ever made from bytes that were read back,
hashed here and compared with what the Hub says of them.

Imports run one way: `sizes` → `locks` → `repository` → `transfer` → (`process`, `room`, `leftovers`) → `failures` →
`client`.
`child` is what runs in the process in which the client itself transfers files; nothing imports it.

Invariants: no pickle is ever fetched; a lock that exists keeps its commit, however far its branch moves, unless it
is told to move; what is locked and whole on this machine needs no network; the token comes from `HF_TOKEN` and nowhere
else; nothing waits for ever.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
