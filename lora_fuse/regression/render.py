"""Where published model cards find `condition_area`; its place is `lora_fuse.pictures.render`."""

from lora_fuse.pictures.render import condition_area

__all__ = ["condition_area"]
