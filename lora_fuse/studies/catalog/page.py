"""The catalog as a page, as Markdown and as JSON.

The page is one file that asks the network for nothing and runs no script; it has the styles of the regression's report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_fuse.machine import progress
from lora_fuse.pictures import pages
from lora_fuse.studies.catalog.records import Entry

SCHEMA = 1


def catalog_html(entries: Sequence[Entry]) -> str:
    """The page; pictures are in it."""
    filters: dict[str, Callable[..., object]] = {
        "bytes": progress.human_bytes,
        "sharing": sharing,
        "web": _web,
    }
    return pages.render_page(
        "lora_fuse.studies.catalog", "catalog.html.j2", filters=filters, entries=entries, summary=summary(entries)
    )


def catalog_markdown(entries: Sequence[Entry], folder: Path) -> str:
    """The same to read in a terminal or on a code host.

    Args:
        entries: all variants.
        folder: where the text will lie; pictures are linked from there.
    """
    rows = [("variant", "state", "verdict", "LoRAs", "size", "published")]
    rows += [
        (
            one.name,
            one.state,
            one.verdict or "–",  # noqa: RUF001
            ", ".join(f"{lora.name} at {lora.scale:g}" for lora in one.loras),
            progress.human_bytes(one.size.total) if one.size else "–",  # noqa: RUF001
            _published(one),
        )
        for one in entries
    ]
    table = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    table.insert(1, "|---" * len(rows[0]) + "|")
    sections = [_section(one, folder) for one in entries]
    return "\n".join(["# Variants", "", summary(entries), "", *table, "", *sections])


def _section(one: Entry, folder: Path) -> str:
    lines = [f"## {one.name}", "", f"- recipe {one.recipe}, {one.pipeline}", f"- base {_code(one.base.label)}"]
    for lora in one.loras:
        sha256 = f", sha256 {_code(lora.sha256)}" if lora.sha256 else ""
        lines.append(f"- LoRA {lora.name}: {_code(f'{lora.label}/{lora.file}')} at scale {lora.scale:g}{sha256}")
    if one.size:
        lines.append(f"- {progress.human_bytes(one.size.total)}, {sharing(one)}; {one.targets} weights changed")
    if one.verdict:
        lines.append(f"- {one.verdict} on {one.environment}, {one.judged}")
    if one.publication:
        tag = f", tag {one.publication.tag}" if one.publication.tag else ""
        lines.append(f"- published as {_code(f'{one.publication.repo_id}@{one.publication.commit}')}{tag}")
    lines += [f"- {note}" for note in (*one.notes, *(one.publication.notes if one.publication else ()))]
    lines += [f"- next: {_code(one.command)}"] if one.command else []
    pictures = [
        f"![{one.name}, {shown.case}]({os.path.relpath(shown.path, folder)})"
        for shown in one.pictures
        if shown.thumbnail
    ]
    return "\n".join([*lines, "", *([" ".join(pictures), ""] if pictures else [])])


def catalog_json(entries: Sequence[Entry]) -> str:
    """The same for a program: `lora_fuse.studies.catalog.records.Entry` without the thumbnails."""
    return json.dumps({"schema": SCHEMA, "variants": [_plain(one) for one in entries]}, indent=2) + "\n"


def _plain(one: Entry) -> dict[str, Any]:
    content = asdict(one)
    for picture in content["pictures"]:
        del picture["thumbnail"]
        picture["path"] = picture["path"].as_posix()
    return content | {"report": one.report.as_posix() if one.report else None}


def summary(entries: Sequence[Entry]) -> str:
    """How many variants there are, in which states."""
    states = [one.state for one in entries]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states))]
    passed = sum(bool(one.passed) for one in entries if one.state == "built")
    published = sum(one.publication is not None for one in entries)
    total = f"{len(entries)} {'variant' if len(entries) == 1 else 'variants'}"
    return f"{total}: {', '.join(counts) or 'none'}; {passed} passed as built, {published} published."


def sharing(one: Entry) -> str:
    """How much of the merged repository is the base's."""
    size = one.size
    if size is None:
        return ""
    linked = (
        "" if size.hard_linked is None else f", {progress.human_bytes(size.hard_linked)} hard-linked to it on this disk"
    )
    return f"{progress.human_bytes(size.from_base)} of it are the base's{linked}"


def _published(one: Entry) -> str:
    if one.publication is None:
        return f"not yet: {one.repo_id}" if one.repo_id else "not to be"
    older = " (older)" if one.publication.notes else ""
    return f"{one.publication.repo_id}, {one.publication.tag or one.publication.commit[:12]}{older}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{text}`"


def _web(url: str | None) -> bool:
    """Whether it is an address to follow, and no script."""
    return bool(url and url.startswith(("https://", "http://")))
