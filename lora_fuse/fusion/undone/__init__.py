"""A fuse taken back: LoRAs out of a merged checkpoint, with a count of the weights that rounding has made uncertain."""
