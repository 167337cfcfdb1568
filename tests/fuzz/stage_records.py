"""Parsers of records: what a stage leaves for another one, on this machine or in a repository."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from lora_fuse.fusion import read_build, read_manifest
from lora_fuse.hub import Receipt
from lora_fuse.machine import FileRecord, progress
from lora_fuse.machine.staging import StagingFolder
from lora_fuse.recipe import Artifacts, Recipe, hf_cache, paths, records
from lora_fuse.regression import approval, approved_list, gate, run_record
from lora_fuse.regression.candidates import Candidates
from lora_fuse.regression.goldens import GoldenRecord, Goldens
from lora_fuse.studies.catalog import catalog_html, catalog_json, catalog_markdown, gather
from lora_fuse.studies.sweep.pins import SweepLocks
from lora_fuse.studies.sweep.points import PointRecord
from tests.fuzz import formats
from tests.fuzz.bounds import ROOT, own_folder
from tests.fuzz.parsers import Parser, these, write
from tests.support import approved, cards
from tests.support.publications import Place

FILE = FileRecord(5, "5" * 64)
LOCKS = (
    records.BaseLock(1, cards.BASE),
    records.LoraLock(1, {"l": dataclasses.replace(cards.BASE, repo_id=None, path="here", revision=None)}),
)
CANDIDATES = Candidates(1, "d" * 64, {"rabbit": approved.candidate(approved.png())})
RUN = dataclasses.replace(
    approved.run_record(candidates=records.to_json(CANDIDATES)), costs={"rabbit": {"seconds": 1.0, "peak_bytes": None}}
)
RECEIPT = Receipt(1, "published", None, "a/b", "c" * 40, "v1", 1, "https://x", True, {"README.md": FILE}, "d" * 64)
GOLDEN = GoldenRecord(1, "a" * 64, {"psnr_db": 60.0}, approved.APPROVAL, approved.PROVENANCE)
BUILD = records.BuildRecord(1, "d" * 64, cards.TOOL, "2026-01-01T00:00:00Z", "cpu", 5, 1.0)
BUILT = dataclasses.replace(BUILD, manifest_sha256=run_record.digest_of(records.to_json(cards.MANIFEST)))
RECORDS: tuple[object, ...] = (
    *LOCKS,
    cards.MANIFEST,
    records.Exports(1, "d" * 64, {"a": FILE}),
    BUILD,
    records.VerifyRecord(1, "d" * 64, 7, 16, cards.TOOL, "2026-01-01T00:00:00Z"),
    CANDIDATES,
    RUN,
    GOLDEN,
    RECEIPT,
    SweepLocks(1, [cards.BASE]),
    PointRecord(1, "k", {"a": 1}, {"b": FILE}),
)
VERIFY = {"passed": True, "problem_count": 0, "manifest_sha256": "d" * 64, "targets": 2, "problems": []}
METRICS: dict[str, object] = {
    "passed": False,
    "verdict": "regression",
    "manifest_sha256": "d" * 64,
    "recipe": "pocket",
    "environment": "cpu-x",
    "rabbit.verdict": "regression",
    "rabbit.agrees": True,
    "rabbit.reasons": "a reason",
    "rabbit.over_floor": 0.5,
    **{
        f"rabbit.{pair}.{name}": value
        for pair in ("golden", "unfused")
        for name, value in (("max_abs", 3.0), ("psnr_db", 50.0), ("identical", False), ("latents_l2", 0.1))
    },
}


def encoded(content: object) -> bytes:
    """A dictionary as JSON, a record as its stage writes it."""
    return (json.dumps(content) if isinstance(content, dict) else records.to_json(content)).encode()


LOCK_FILES = {name: encoded(lock) for name, lock in zip(("base.lock.json", "lora.lock.json"), LOCKS, strict=True)}
JUDGED = ("verify.json", "merged.manifest.json", "regression/metrics.json", "regression/candidates.json")
MERGED = {
    "merged.manifest.json": encoded(cards.MANIFEST),
    "merged.build.json": encoded(BUILT),
    "merged/model_index.json": b'{"_class_name": "P"}',
    "merged/scheduler/scheduler_config.json": b'{"shift": 1.0}',
    "publish.json": encoded(RECEIPT),
    "verify.json": encoded(VERIFY),
    "regression/metrics.json": encoded(METRICS),
    **LOCK_FILES,
}


def record_of(kind: type[Any]) -> Callable[[Path, bytes], object]:
    def parse(_: Path, content: bytes) -> None:
        records.from_json(kind, content.decode("utf-8", "surrogateescape"), "x.json")

    return parse


def locks(at: str) -> Callable[[Path, bytes], object]:
    """Locks as the stages read them, with the cache that they name."""

    def parse(folder: Path, content: bytes) -> None:
        cache = "hf/hub/models--owner--base/snapshots/" + cards.COMMIT
        build = left(folder, LOCK_FILES | {at: content})
        write(folder, {f"{place}/model_index.json": b"{}" for place in (cache, "here")})
        with patch.dict(os.environ, HF_HOME=str(folder / "hf")):
            base, loras = build.read_locks()
            for lock in (base, *loras.values()):
                str((lock.label, lock.size, lock.lora_name))
                hf_cache.locate(lock)

    return parse


def left(folder: Path, files: Mapping[str, bytes], variant: str | None = None) -> Artifacts:
    """What the stages of a build left."""
    write(folder / "artifacts", files)
    return Artifacts(folder / "artifacts", variant)


@cache
def results() -> dict[str, bytes]:
    """The results of a right build that are judged, by their paths."""
    with own_folder() as folder:
        Place(folder).fill()
        return {name: (folder / "artifacts" / name).read_bytes() for name in JUDGED}


def judged(name: str) -> Callable[[Path, bytes], object]:
    """The gate, the summary and the conditions of an approval, of a right build with one odd result."""

    def parse(folder: Path, content: bytes) -> None:
        build = Artifacts(folder / "artifacts")
        write(build.root, results() | {name: content})
        decision = gate.decide(recipe(), build)
        if decision.metrics:
            gate.summary_text(decision.metrics, run_record.read_run(build), "report.html", "next")
        found = records.read(Candidates, build.candidates)
        approval.check_weights(found.manifest_sha256, found.cases, paths.read_object(build.verify, "v"), build.verify)
        approval.check_asked(found.cases, {}, 4)
        approval.read_pictures(build.images, found.cases)

    return parse


def merge_records(at: str) -> Callable[[Path, bytes], object]:
    """Manifest and build's record of a merge, and all that the catalog says of it."""

    def parse(folder: Path, content: bytes) -> None:
        build = left(folder, MERGED | {at: content}, "pocket")
        entry = gather(recipe(), build, of="pocket", build="b", publish="p")
        for page in (catalog_html, catalog_json):
            page([entry])
        catalog_markdown([entry], folder)
        _, manifest_sha256 = read_manifest(build.manifest)
        if at != "merged.manifest.json":
            read_build(build.manifest, manifest_sha256)

    return parse


@cache
def recipe() -> Recipe:
    return Recipe.parse(yaml.safe_load((ROOT / "params.yaml").read_text()), "params.yaml")


def golden_files() -> dict[str, bytes]:
    """A golden, its record, and the list that binds them."""
    png = approved.png()
    record = records.to_json(dataclasses.replace(GOLDEN, sha256=hashlib.sha256(png).hexdigest())).encode()
    return bound({"rabbit.png": png, "rabbit.json": record})


def bound(files: dict[str, bytes]) -> dict[str, bytes]:
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items())]
    return {**files, approved_list.LIST: "".join(["# by somebody\n", *lines]).encode()}


def golden(name: str) -> Callable[[Path, bytes], object]:
    """A golden of which one file is odd, and listed as it is."""

    def parse(folder: Path, content: bytes) -> None:
        files = golden_files()
        odd = {name: content}
        pair = {one: odd.get(one, files[one]) for one in ("rabbit.png", "rabbit.json")}
        write(folder / "golden" / str(approved.KEY), bound(pair) | odd)
        found = Goldens(folder / "golden")
        found.for_run(approved.KEY, ["rabbit"])
        found.refuse_other_base("owner/base", {})

    return parse


def done_mark(folder: Path, content: bytes) -> None:
    """A mark of a finished file, of a merge that was killed."""
    write(folder, {"files/a": b"12345", "done/a.json": content})
    StagingFolder(folder).keep_finished(["a"])


def rates(folder: Path, content: bytes) -> None:
    """What earlier runs measured on this machine."""
    with patch.dict(os.environ, XDG_CACHE_HOME=str(folder)):
        path = progress.rates_file()
        assert path.is_relative_to(folder)
        write(path.parent, {path.name: content})
        progress.estimate("hash", 1 << 40)


def rows() -> Iterator[Parser]:
    json_file = partial(Parser, format=formats.JSON)
    for record in RECORDS:
        yield json_file(type(record).__name__, record_of(type(record)), valid=these(encoded(record)))
    for name, content in LOCK_FILES.items():
        yield json_file(
            f"{name}, used",
            locks(name),
            valid=these(content),
        )
    of_build = partial(json_file, prepare=lambda folder: Place(folder).fill(), allowed=("subprocess.Popen",))
    for name in JUDGED:
        valid = partial(lambda name: [results()[name]], name)
        yield of_build(
            f"gate and approval, {Path(name).name}",
            judged(name),
            valid=valid,
        )
    for name, content in MERGED.items():
        yield json_file(f"catalog, {Path(name).name}", merge_records(name), valid=these(content), examples=6)
    kinds = {"rabbit.json": formats.JSON, "rabbit.png": formats.PNG, approved_list.LIST: formats.raw}
    for name, kind in kinds.items():
        yield Parser(
            f"golden, {name}",
            golden(name),
            kind,
            these(golden_files()[name]),
        )
    yield json_file("done mark", done_mark, valid=these(encoded({"size": 5, "sha256": "5" * 64})))
    yield json_file("rates", rates, valid=these(encoded({"hash": 1e9, "fuse": 5e8})))
