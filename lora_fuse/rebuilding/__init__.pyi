from .made_again import Rebuilt as Rebuilt
from .made_again import rebuild as rebuild
from .rebuild_command import add_rebuild as add_rebuild
from .rebuild_command import add_rebuilders as add_rebuilders
from .rebuild_command import run_rebuilders as run_rebuilders
