"""Controls of the gate: wrong merges that it has to refuse, and harmless changes that it has to let through.

`rig` merges and renders, `control` judges, `faults` and `benign` are the controls, `table` shows the outcomes.
"""
