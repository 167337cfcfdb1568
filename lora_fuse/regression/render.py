"""Re-export of `condition_area`, which published model cards import from here; new ones import it from `lora_fuse`."""

from lora_fuse.pictures import render

condition_area = render.condition_area
