"""``python -m lora_fuse``."""

import sys

from lora_fuse.cli import main

sys.exit(main())
