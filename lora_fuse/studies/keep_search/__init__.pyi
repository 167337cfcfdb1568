from .searching import SearchedKeep as SearchedKeep
from .searching import search_keep as search_keep
