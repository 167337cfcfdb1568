"""Write a tiny pipeline and LoRAs for it: ``python -m tests.tiny_models sdxl FOLDER``.

The pipeline goes to FOLDER/model, the LoRAs to FOLDER/lora: of a family with two transformers one for each, else one
for all its parts, in the names that trainers write.
"""

import sys
from pathlib import Path

from tests.tiny_models import FAMILIES, tiny
from tests.tiny_models.loras import write_loras

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in FAMILIES:
        sys.exit(f"python -m tests.tiny_models {{{','.join(FAMILIES)}}} FOLDER")
    root = Path(sys.argv[2])
    write_loras(sys.argv[1], tiny(sys.argv[1], root / "model"), root / "lora")
