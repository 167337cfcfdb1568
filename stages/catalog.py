"""``python -m stages.catalog``: one page of all variants, from `variants/params.yaml` and what their stages left."""

from __future__ import annotations

from lora_fuse.errors import Rerun
from lora_fuse.machine import PLAIN, Console, files
from lora_fuse.recipe import Artifacts, Recipe, paths
from lora_fuse.studies.catalog import Places, Wanted, WantedLora, catalog_html, catalog_json, catalog_markdown, gather
from stages.config.variants import Build, read_compiled
from stages.run import command, run_stage

CATALOG = paths.ROOT / "catalog"


def catalog(_: Recipe, __: Artifacts, console: Console = PLAIN) -> int:
    """Write `catalog.html`, `catalog.md` and `catalog.json`."""
    compiled = read_compiled()
    entries = []
    for name, build in compiled.builds.items():
        params = compiled.params(name)
        at = Artifacts.of_variant(name, params)
        places = Places(**{place: getattr(at, place) for place in Places.__dataclass_fields__})
        entries.append(gather(wanted(params, build, at), places))
    pages = {"html": catalog_html(entries), "md": catalog_markdown(entries, CATALOG), "json": catalog_json(entries)}
    for kind, text in pages.items():
        files.replace_text(CATALOG / f"catalog.{kind}", text)
    lines = [f"{one.name}: {one.state}{f', {one.verdict}' if one.verdict else ''}" for one in entries]
    facts = {"variants": {one.name: one.state for one in entries}, "page": str(CATALOG / "catalog.html")}
    console.done("catalog", *lines, f"see {CATALOG / 'catalog.html'}", facts=facts)
    return 0


def wanted(params: Recipe, build: Build, at: Artifacts) -> Wanted:
    """A variant as its parameters have it."""
    selection = params.fuse.selection
    return Wanted(
        name=params.name,
        recipe=build.recipe,
        base=params.base,
        pipeline=params.base.pipeline,
        loras={n: WantedLora(lora, lora.filename, params.fuse.scale_of(n)) for n, lora in params.loras.items()},
        selection=None if selection.everything else selection,
        scheduler=params.scheduler_config,
        cases={name: case.prompt for name, case in params.regress.cases.items()},
        repo_id=params.publish.repo_id,
        tag=params.publish.tag,
        build=command(Rerun("build"), at),
        publish=command(Rerun("publish"), at) if at.published else None,
    )


if __name__ == "__main__":
    run_stage(catalog, writes=False)
