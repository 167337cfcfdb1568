"""Is a new version of a LoRA a good one: it has to change pictures, so no golden can say it.

`files` compares the two files, `effect` what they do to pictures, `judgement` decides, `sides` renders what is
compared; `report` and `junit` show it. Imports run that way: `report` → `sides` → `judgement` → (`files`, `effect`).
"""
