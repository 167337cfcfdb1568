from .searching import search_keep as search_keep
