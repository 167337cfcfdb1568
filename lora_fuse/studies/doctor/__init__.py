"""Whether a recipe fits a machine, asked before anything is fetched or written; each check is a `Finding`.

Checks are functions of what was read, so that they can be given any reading; `examination` reads, and asks them all.
"""

from lora_fuse.studies.doctor.examination import ExaminedRecipe, examine
from lora_fuse.studies.doctor.finding import Finding, Status, table, verdict

__all__ = ["ExaminedRecipe", "Finding", "Status", "examine", "table", "verdict"]
