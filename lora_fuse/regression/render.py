"""Where published model cards find `condition_area`; new ones import it from `lora_fuse`."""

from lora_fuse.pictures import render

condition_area = render.condition_area
