"""A merged checkpoint published: exactly the manifest's files and a card, through a pull request, then read back.

Invariants: nothing is sent that the manifest does not name, or that is not what it says; a pull request is only
merged when every file on it has the right hash, and success is only claimed of a commit of which the same is true;
publishing what is there already sends nothing, and a run that died is taken up where it was.
"""

from lora_fuse.publishing.local import CARD
from lora_fuse.publishing.preview import preview
from lora_fuse.publishing.push import publish
from lora_fuse.publishing.receipt import Receipt, skipped

__all__ = ["CARD", "Receipt", "preview", "publish", "skipped"]
