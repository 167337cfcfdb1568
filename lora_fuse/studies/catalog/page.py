"""The catalog as a page, as Markdown and as JSON.

The page is one file that asks the network for nothing and runs no script; it has the styles of the regression's report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_fuse.machine import progress, text
from lora_fuse.pictures import pages
from lora_fuse.studies.catalog.entry import CatalogEntry

SCHEMA = 1


def catalog_html(entries: Sequence[CatalogEntry]) -> str:
    """The page; pictures are in it."""
    return pages.render_page(
        "lora_fuse.studies.catalog",
        "catalog.html.j2",
        filters={"bytes": progress.human_bytes, "sharing": sharing, "web": _web},
        entries=entries,
        summary=summary(entries),
    )


def catalog_markdown(entries: Sequence[CatalogEntry], folder: Path) -> str:
    """The same to read in a terminal or on a code host; pictures are linked from `folder`, where it will lie."""
    rows = [("variant", "state", "verdict", "LoRAs", "size", "published")]
    rows += [
        (
            entry.name,
            entry.state,
            entry.verdict or "–",  # noqa: RUF001
            ", ".join(f"{lora.name} at {lora.scale:g}" for lora in entry.loras),
            progress.human_bytes(entry.size.total) if entry.size else "–",  # noqa: RUF001
            _published(entry),
        )
        for entry in entries
    ]
    table = text.markdown_table(rows)
    sections = [_section(entry, folder) for entry in entries]
    return "\n".join(["# Variants", "", summary(entries), "", table, "", *sections])


def _section(entry: CatalogEntry, folder: Path) -> str:
    shown = text.markdown
    lines = [f"## {shown(entry.name)}", "", f"- recipe {shown(entry.recipe)}, {shown(entry.pipeline)}"]
    lines.append(f"- base {text.code(entry.base.label)}")
    for lora in entry.loras:
        sha256 = f", sha256 {text.code(lora.sha256)}" if lora.sha256 else ""
        lines.append(
            f"- LoRA {shown(lora.name)}: {text.code(f'{lora.label}/{lora.file}')} at scale {lora.scale:g}{sha256}"
        )
    if entry.size:
        lines.append(f"- {progress.human_bytes(entry.size.total)}, {sharing(entry)}; {entry.targets} weights changed")
    if entry.verdict:
        lines.append(f"- {shown(f'{entry.verdict} on {entry.environment}, {entry.judged}')}")
    if entry.publication:
        tag = f", tag {shown(entry.publication.tag)}" if entry.publication.tag else ""
        lines.append(f"- published as {text.code(f'{entry.publication.repo_id}@{entry.publication.commit}')}{tag}")
    lines += [f"- {shown(note)}" for note in (*entry.notes, *(entry.publication.notes if entry.publication else ()))]
    if entry.command:
        lines.append(f"- next: {text.code(entry.command)}")
    pictures = [
        f"![{shown(f'{entry.name}, {one.case}')}]({text.link(os.path.relpath(one.path, folder))})"
        for one in entry.pictures
        if one.thumbnail
    ]
    return "\n".join([*lines, "", *([" ".join(pictures), ""] if pictures else [])])


def catalog_json(entries: Sequence[CatalogEntry]) -> str:
    """The same for a program: `lora_fuse.studies.catalog.entry.CatalogEntry` without the thumbnails."""
    return json.dumps({"schema": SCHEMA, "variants": [_plain(entry) for entry in entries]}, indent=2) + "\n"


def _plain(entry: CatalogEntry) -> dict[str, Any]:
    content = asdict(entry)
    for picture in content["pictures"]:
        del picture["thumbnail"]
        picture["path"] = picture["path"].as_posix()
    return content | {"report": entry.report.as_posix() if entry.report else None}


def summary(entries: Sequence[CatalogEntry]) -> str:
    """The number of variants, in all and by state."""
    states = [entry.state for entry in entries]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states))]
    passed = sum(bool(entry.passed) for entry in entries if entry.state == "built")
    published = sum(entry.publication is not None for entry in entries)
    total = f"{len(entries)} {'variant' if len(entries) == 1 else 'variants'}"
    return f"{total}: {', '.join(counts) or 'none'}; {passed} passed as built, {published} published."


def sharing(entry: CatalogEntry) -> str:
    """The share of the merged repository that is the base's, in bytes."""
    size = entry.size
    if size is None:
        return ""
    linked = (
        "" if size.hard_linked is None else f", {progress.human_bytes(size.hard_linked)} hard-linked to it on this disk"
    )
    return f"{progress.human_bytes(size.from_base)} of it are the base's{linked}"


def _published(entry: CatalogEntry) -> str:
    if entry.publication is None:
        return f"not yet: {entry.repo_id}" if entry.repo_id else "not to be"
    older = " (older)" if entry.publication.notes else ""
    return f"{entry.publication.repo_id}, {entry.publication.tag or entry.publication.commit[:12]}{older}"


def _web(url: str | None) -> bool:
    """True of an address to follow, and of no script."""
    return bool(url and url.startswith(("https://", "http://")))
