"""No sha256 is published that no file has: what is sent, and what it was made of, is hashed before it is named."""

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from lora_fuse.errors import Refused
from lora_fuse.fusion.manifest import read_manifest
from lora_fuse.machine import file_state, files
from lora_fuse.recipe.paths import HERE as at  # noqa: N811
from stages.publish import publish
from tests.support.merges import hashes
from tests.support.released import LORA_FILE, WEIGHTS, Project, flip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A build of local files whose unchanged weights are the merge's too; there is no Hub."""
    made = Project.of_local_files(tmp_path / "project", monkeypatch, "fuse.untouched=hardlink")
    made.build()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return made


def refused(project: Project) -> str:
    """The message of a publication, and of its preview, that writes nothing."""
    before = hashes(Path("artifacts"))
    messages = set()
    for dry_run in (False, True):
        with pytest.raises(Refused) as caught:
            publish(project.params(), dry_run=dry_run)
        messages.add(str(caught.value))
    assert hashes(Path("artifacts")) == before
    (message,) = messages
    return message


def test_all_that_provenance_names_is_what_it_says(project: Project) -> None:
    for name in (f"base/{WEIGHTS}", "base/vae/config.json", f"lora/{LORA_FILE}", f"artifacts/merged/{WEIGHTS}"):
        was = files.hash_file(Path(name)).sha256
        flip(Path(name))
        now = files.hash_file(Path(name)).sha256
        assert refused(project).startswith(f"{name} is not what the manifest says: sha256 {now}, expected {was}")
        flip(Path(name))
    lock = at.lora_lock.read_text()
    at.lora_lock.write_text(lock.replace(files.hash_file(Path(f"lora/{LORA_FILE}")).sha256, "5" * 64))
    assert "is of other files than artifacts/base.lock.json and artifacts/lora.lock.json name" in refused(project)
    at.lora_lock.write_text(lock)
    Path(f"lora/{LORA_FILE}").unlink()
    assert "not on this machine; run the download stage" in refused(project)


def test_every_content_is_hashed_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: Counter[int] = Counter()
    whole = file_state.hash_steady

    def hash_steady(path: Path, *others: object) -> object:
        hashed[path.stat().st_ino] += 1
        return whole(path, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(file_state, "hash_steady", hash_steady)
    publish(project.params("publish.repo_id=null"), dry_run=True)
    manifest, _ = read_manifest(at.manifest)
    assert manifest.base is not None
    merged = [at.merged / name for name in manifest.files]
    sources = [*(Path("base", name) for name in manifest.base.files), Path("lora", LORA_FILE)]
    assert {path.stat().st_ino for path in merged} & {path.stat().st_ino for path in sources}  # they are linked
    assert {hashed[path.stat().st_ino] for path in (*merged, *sources)} == {1}


def test_a_picture_that_is_not_the_one_that_was_edited_is_refused(project: Project) -> None:
    pictures = project.root / "pocket"
    pictures.unlink()
    (pictures / "inputs").mkdir(parents=True)
    for name in ("hat", "rabbit"):
        Image.new("RGB", (8, 8)).save(pictures / f"inputs/{name}.png")
    assert "pocket/inputs/rabbit.png is not the picture that rabbit was made from" in refused(project)
