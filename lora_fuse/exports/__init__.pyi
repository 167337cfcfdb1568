from .formats import export as export
from .formats import export_size as export_size
from .formats import is_export as is_export
from .formats import words as words
from .readers import readers_of as readers_of
from .reading import read_export as read_export
from .recognition import problems as problems
from .recognition import unreadable as unreadable
