"""Is a new version of a LoRA a good one: it has to change pictures, so no golden can say it.

`files` compares the two files, `effect` what they do to pictures; `sides` renders and measures, which gives the
`evidence`; `questions` are asked of it, and `judgement` decides. `report` and `junit` show it.
"""
