"""Costs of a fuse, a download, a publication, a sweep: measured at real shapes, by tools that make them repeatable."""

from lora_fuse.machine import interrupts

interrupts.install(interrupts.KEPT)
