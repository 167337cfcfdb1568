from .formats import export as export
from .formats import export_size as export_size
from .formats import is_export as is_export
from .formats import words as words
from .reading import read_export as read_export
