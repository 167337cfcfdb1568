"""``python -m stages.catalog``: one page of all variants, from `variants/params.yaml` and what their stages left."""

from __future__ import annotations

from lora_fuse.errors import Rerun
from lora_fuse.machine import Console, staging
from lora_fuse.recipe import Artifacts, Recipe, paths
from lora_fuse.studies.catalog import CatalogEntry, catalog_html, catalog_json, catalog_markdown, gather
from stages.config.variants import Compiled, read_compiled
from stages.run import PLAIN, command, run_stage

CATALOG = paths.ROOT / "catalog"
PAGES = tuple(CATALOG / f"catalog.{kind}" for kind in ("html", "md", "json"))


def catalog(_: Recipe, __: Artifacts, console: Console = PLAIN) -> int:
    """Write `catalog.html`, `catalog.md` and `catalog.json`."""
    compiled = read_compiled()
    entries = [entry_of(compiled, name) for name in compiled.builds]
    texts = (catalog_html(entries), catalog_markdown(entries, CATALOG), catalog_json(entries))
    with staging.exclusive(CATALOG), staging.whole(CATALOG) as folder:
        for page, text in zip(PAGES, texts, strict=True):
            (folder / page.name).write_text(text, encoding="utf-8")
    lines = [f"{entry.name}: {entry.state}{f', {entry.verdict}' if entry.verdict else ''}" for entry in entries]
    facts = {"variants": {entry.name: entry.state for entry in entries}, "page": str(PAGES[0])}
    console.done("catalog", *lines, f"see {PAGES[0]}", facts=facts)
    return 0


def entry_of(compiled: Compiled, name: str) -> CatalogEntry:
    """A variant as its stages left it."""
    recipe = compiled.params(name)
    at = Artifacts.of_variant(name, recipe)
    publish = command(Rerun("publish"), at) if at.published else None
    return gather(recipe, at, of=compiled.builds[name].recipe, build=command(Rerun("build"), at), publish=publish)


if __name__ == "__main__":
    run_stage(catalog, writes=False, pages=PAGES)
