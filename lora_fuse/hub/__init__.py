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

from lora_fuse.hub.client import bars_on_a_terminal, card_text, client, endpoint, is_offline, token
from lora_fuse.hub.error_texts import client_errors
from lora_fuse.hub.locks import changes, checked, lock_base, lock_lora, moved, verify_files, will_lock
from lora_fuse.hub.payload import CARD
from lora_fuse.hub.preview import preview
from lora_fuse.hub.publisher import publish
from lora_fuse.hub.receipt import Receipt, skipped
from lora_fuse.hub.repository import listing, remote_files
from lora_fuse.hub.sizes import Sizes, base_sizes, lora_sizes

__all__ = [
    "CARD",
    "Receipt",
    "Sizes",
    "bars_on_a_terminal",
    "base_sizes",
    "card_text",
    "changes",
    "checked",
    "client",
    "client_errors",
    "endpoint",
    "is_offline",
    "listing",
    "lock_base",
    "lock_lora",
    "lora_sizes",
    "moved",
    "preview",
    "publish",
    "remote_files",
    "skipped",
    "token",
    "verify_files",
    "will_lock",
]
