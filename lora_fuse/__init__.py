"""Fuse LoRAs into a diffusion checkpoint, prove the result, compare its pictures. Works without DVC or Hydra."""
