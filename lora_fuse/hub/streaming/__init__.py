"""Files of a commit read from the Hub while they are used, and never kept: by HTTP ranges, several at a time."""

from lora_fuse.hub.streaming import streamed_base as streamed_base
