"""Sweeps: the same model built at several points (scales, LoRAs), each looked at, compared and thrown away again.

Imports run one way: `running` and `rendering` touch files and models; `recommendation`, `curves`, `numbers` and `sheet`
are of numbers and text.
"""
