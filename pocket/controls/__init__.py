"""Controls of the gate: wrong merges that it has to refuse, and harmless changes that it has to let through.

`faults` and `benign` say what is done, `rig` builds and judges it, `control` says what counts as caught, `table` shows
what came of it.
"""
