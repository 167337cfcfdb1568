from .extract_command import add_extract as add_extract
from .extraction import Extracted as Extracted
from .extraction import extract as extract
from .unmerge_command import add_unmerge as add_unmerge
from .unmerge_command import run_unmerge as run_unmerge
from .unmerging import unmerge as unmerge
