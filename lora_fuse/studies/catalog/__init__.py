"""The catalog of variants: what each is made of, whether it is built and right, what it looks like, where it is."""

from lora_fuse.studies.catalog.gather import gather
from lora_fuse.studies.catalog.page import catalog_html, catalog_json, catalog_markdown
from lora_fuse.studies.catalog.records import Entry, Places, Wanted, WantedLora

__all__ = ["Entry", "Places", "Wanted", "WantedLora", "catalog_html", "catalog_json", "catalog_markdown", "gather"]
