"""What was hashed is what is used: whatever changes in base or LoRA after the download is refused, and nothing is left.

A change is made as it would be missed: the size stays, and the time of the change is set back.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from lora_fuse.errors import BadSource, LoraFuseError, Refused
from lora_fuse.machine import file_state, files
from lora_fuse.recipe import paths
from lora_fuse.recipe.paths import HERE as at  # noqa: N811
from lora_fuse.recipe.recipe import Recipe
from stages.download import download
from stages.fuse import fuse
from stages.regress import regress
from stages.verify import verify
from tests.support.merges import hashes
from tests.support.released import LORA_FILE, WEIGHTS, Project

FUSED, TAKEN, LORA = f"base/{WEIGHTS}", "base/vae/diffusion_pytorch_model.safetensors", f"lora/{LORA_FILE}"
READ = "base/model_index.json"  # the merge has another, made of it
HASH = "fuse.inputs=hash"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A build of local files, in the folder that is the current one."""
    made = Project.of_local_files(tmp_path / "project", monkeypatch)
    recipe = made.params()
    time.sleep(2 * file_state.TICK / 1e9)
    for stage in (download, fuse, verify):
        assert stage(recipe) == 0
    return made


def flip(name: str) -> tuple[str, str]:
    """Change a byte of a file, and set the time of the change back; returns the sha256 before and after."""
    path = Path(name)
    before = path.stat()
    was = files.hash_file(path).sha256
    content = bytearray(path.read_bytes())
    content[content.rfind(b"Pipeline") if path.suffix == ".json" else -3] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return was, files.hash_file(path).sha256


def rot(name: str) -> tuple[str, str]:
    """As `flip`, and as a disk does it: nothing that `stat` says has changed, so far as this machine remembers."""
    changed = flip(name)
    known = json.loads(paths.SEEN.read_text())
    known[str(Path(name).resolve())] |= asdict(file_state.FileState.of(Path(name).stat()))
    paths.SEEN.write_text(json.dumps(known))
    return changed


def results() -> dict[str, str]:
    return {name: sha256 for name, sha256 in hashes(Path("artifacts")).items() if name != paths.SEEN.name}


def refused(stage: Callable[[Recipe], int], recipe: Recipe, kind: type[LoraFuseError] = BadSource) -> str:
    """The message of a stage that leaves all earlier results as they were."""
    before = results()
    with pytest.raises(kind) as caught:
        stage(recipe)
    assert results() == before
    assert not list(Path("artifacts").glob(".merged.partial*"))
    return str(caught.value)


@pytest.mark.parametrize("name", [FUSED, TAKEN, LORA, READ])
def test_what_changed_after_the_download_is_refused_by_every_stage_that_reads_it(project: Project, name: str) -> None:
    recipe = project.params()
    was, now = flip(name)
    for stage in (fuse, verify, regress):
        message = refused(stage, recipe)
        assert was in message
        assert now in message
        assert Path(name).name in message
        assert "run the download stage" in message


def test_a_file_that_was_touched_or_that_nobody_remembers_is_hashed_again(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = project.params()
    hashed: list[str] = []
    whole = file_state.hash_steady

    def hash_steady(path: Path, *others: object) -> object:
        hashed.append(path.name)
        return whole(path, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(file_state, "hash_steady", hash_steady)
    assert verify(recipe) == 0
    assert hashed == []  # download remembers what it hashed
    os.utime(FUSED)
    time.sleep(2 * file_state.TICK / 1e9)
    assert verify(recipe) == 0
    assert hashed == [Path(FUSED).name]
    assert verify(recipe) == 0
    assert hashed == [Path(FUSED).name]  # and so does who hashed it again
    paths.SEEN.unlink()
    assert fuse(recipe) == 0
    locked = [*json.loads(at.base_lock.read_text())["base"]["files"], Path(LORA).name]
    assert len(hashed) == 1 + len(locked)


def test_a_base_that_changes_while_it_is_fused_leaves_the_last_merge(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = project.params()
    place = files.take_over

    def take_over(source: Path, target: Path, how: files.Untouched) -> files.Untouched:
        done = place(source, target, how)
        if source.name == Path(TAKEN).name:
            flip(TAKEN)
        return done

    monkeypatch.setattr(files, "take_over", take_over)
    assert "vae/diffusion_pytorch_model.safetensors changed while it was read" in refused(fuse, recipe, Refused)


def test_what_changes_while_a_stage_reads_is_refused_after_it(project: Project) -> None:
    base, loras = at.read_locks()
    picture = Path("picture.png")
    picture.write_bytes(b"one")

    def read(name: str) -> None:
        with paths.held([base, *loras.values()], [picture]):
            time.sleep(2 * file_state.TICK / 1e9)
            Path(name).write_bytes(Path(name).read_bytes())

    for name in (LORA, "picture.png"):
        with pytest.raises(BadSource, match=f"{Path(name).name} changed while it was read"):
            read(name)


@pytest.mark.parametrize("name", [FUSED, TAKEN, READ])
def test_a_disk_that_rots_is_seen_by_hashing_what_is_read(project: Project, name: str) -> None:
    was, now = rot(name)
    message = refused(fuse, project.params(HASH), Refused)
    assert was in message
    assert now in message
    assert "dvc repro" not in message  # the stage's program adds the command
    assert fuse(project.params()) == 0  # `stat` has nothing to go by


def test_a_lora_that_rots_is_seen_by_its_hash_in_any_case(project: Project) -> None:
    was, now = rot(LORA)
    for recipe in (project.params(), project.params(HASH)):
        message = refused(fuse, recipe)
        assert was in message
        assert now in message


def test_a_link_that_another_build_makes_meanwhile_is_no_change(project: Project) -> None:
    base, loras = at.read_locks()
    with paths.held([base, *loras.values()]):
        os.link(TAKEN, "another build's")
    time.sleep(2 * file_state.TICK / 1e9)
    assert fuse(project.params("fuse.untouched=hardlink")) == 0
    assert fuse(project.params("fuse.untouched=hardlink")) == 0


def test_hashing_what_is_read_changes_no_byte(project: Project) -> None:
    before = results()
    assert fuse(project.params(HASH)) == 0
    after = results()
    assert {name: after[name] for name in before if "build" not in name} == {
        name: sha256 for name, sha256 in before.items() if "build" not in name
    }


ANOTHER = "+loras.y={repo_id:a/b,path:null,revision:main,filename:y.safetensors}"
OTHERS = {
    "base.path=other": "base: download pinned base, and the recipe names other;",
    "loras.lightning.path=other": f"LoRA lightning: download pinned lora: {LORA_FILE}, and the recipe names other: ",
    "loras.lightning.filename=x.safetensors": "the recipe names lora: x.safetensors; run download with",
    ANOTHER: "LoRA y: download pinned none, and the recipe names a/b@main: y.safetensors;",
    f"{ANOTHER} ~loras.lightning": f"LoRA lightning: download pinned lora: {LORA_FILE}, and the recipe names none;",
}


def test_a_stage_by_itself_with_other_sources_than_were_pinned_is_refused(project: Project) -> None:
    """It would make the merge of the pinned ones, and call it that of these."""
    for setting, said in OTHERS.items():
        recipe = project.params(*setting.split())
        for stage in (fuse, verify, regress):
            assert said in refused(stage, recipe)
