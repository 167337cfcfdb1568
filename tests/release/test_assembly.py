"""The published repository: everything, once, of this very merge, no path of this machine, and a card that runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_fuse.errors import BadSource, PublishRefused
from lora_fuse.fusion.manifest import read_manifest
from lora_fuse.machine.files import hash_file
from lora_fuse.recipe.paths import HERE as at  # noqa: N811
from lora_fuse.release.contents import BOM, LIST, PROVENANCE
from lora_fuse.release.download_check import check_published
from lora_fuse.release.signing import SIGNATURE
from stages.publish import publish
from tests.hub_server import LoopbackHub
from tests.support.released import LORA_FILE, REPO, ROOT, Build, Project, flip, leave_exports, tiny_base, tiny_lora


def test_everything_is_published_once_and_again_is_nothing_new(build: Build, hub: LoopbackHub, key: Path) -> None:
    project = build()
    params = project.params(f"publish.signing.key={key}", "export.formats=[single_file]")
    leave_exports(params)
    publish(params)
    manifest, _ = read_manifest(at.manifest)
    beside = {"README.md", LIST, SIGNATURE, PROVENANCE, BOM, "images/blocks.png", "diffusion_models/pocket.safetensors"}
    beside |= {f"images/{case}{kind}.png" for case in ("rabbit", "hat") for kind in ("", ".input")}
    head = hub.registry.repos[REPO].head
    assert head.tree.keys() == {*manifest.files, *beside, ".gitattributes"}
    publish(params)
    assert hub.registry.repos[REPO].head.oid == head.oid
    assert not [path for path in Path("artifacts").iterdir() if path.name.startswith(".release")]


def test_all_that_a_publication_makes_is_known_to_who_checks_it(build: Build, hub: LoopbackHub, tmp_path: Path) -> None:
    params = build().params("export.formats=[single_file]")
    leave_exports(params)
    publish(params)
    for name in hub.registry.repos[REPO].head.tree:
        path = tmp_path / "fetched" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hub.read(REPO, name))
    found = check_published(tmp_path / "fetched", None)
    assert found.problems == []
    assert found.notes == ["diffusion_models/pocket.safetensors is an export: it is not derived again"]


def test_no_path_of_this_machine_is_published(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").mkdir()
    base, lora = tiny_base(tmp_path / "secret/base", "mit"), tiny_lora(tmp_path / "secret/lora", "mit")
    overrides = [f"base.path={base}", f"loras.lightning.path={lora}", f"loras.lightning.filename={LORA_FILE}"]
    project = Project(tmp_path / "project", monkeypatch, overrides)
    project.build()
    publish(project.params())
    for name in hub.registry.repos[REPO].head.tree:
        assert b"secret" not in hub.read(REPO, name), name


def test_pictures_that_were_changed_or_are_of_another_merge_are_refused(build: Build, hub: LoopbackHub) -> None:
    project = build()
    picture = at.images / "rabbit.merged.png"
    content = picture.read_bytes()
    Image.new("RGB", (48, 32)).save(picture)
    with pytest.raises(BadSource, match=r"rabbit\.merged\.png has sha256 .*, and .* was judged"):
        publish(project.params())
    picture.write_bytes(content)
    text = at.candidates.read_text()
    at.candidates.write_text(text.replace(json.loads(text)["manifest_sha256"], "5" * 64))
    with pytest.raises(BadSource, match=f"candidates.json is of manifest {'5' * 64}"):
        publish(project.params())
    assert REPO not in hub.registry.repos


def test_exports_that_were_not_judged_or_changed_or_are_of_another_merge_are_refused(
    build: Build, hub: LoopbackHub
) -> None:
    project = build()
    params = project.params("export.formats=[single_file]")
    with pytest.raises(BadSource, match=r"judges the exports none, and export.formats asks for single_file"):
        publish(params)
    leave_exports(params)
    exported = at.exported / "diffusion_models/pocket.safetensors"
    flip(exported)
    with pytest.raises(PublishRefused, match=r"pocket\.safetensors is not what the manifest says"):
        publish(params)
    text = at.exports.read_text()
    (judged,) = json.loads(text)["files"].values()
    at.exports.write_text(text.replace(judged["sha256"], hash_file(exported).sha256))
    with pytest.raises(BadSource, match=rf"says exports\.single_file\.sha256 {judged['sha256']}, and what lies here"):
        publish(params)
    metrics = at.metrics.read_text()
    wrong = json.loads(metrics) | {"exports.single_file.verdict": "regression", "verdict": "regression"}
    for changed, said in ((wrong | {"exports.single_file.changed": 1}, "passed True"), (wrong, "verdict regression")):
        at.exports.write_text(text)
        at.metrics.write_text(json.dumps(changed))
        with pytest.raises(BadSource, match=said):
            publish(params)
    at.metrics.write_text(json.dumps(wrong | {"exports.single_file.changed": 1, "passed": False}))
    with pytest.raises(PublishRefused, match="the gate is not passed: regression: what was exported as single_file is"):
        publish(params)
    at.metrics.write_text(metrics)
    at.exports.write_text(text.replace(json.loads(text)["manifest_sha256"], "5" * 64))
    with pytest.raises(PublishRefused, match=r"export\.json is of another merge"):
        publish(params)
    assert REPO not in hub.registry.repos


def bash(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    python = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment = {**os.environ, **paths, **python}
    return subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )


def block(card: str, after: str, language: str = "bash") -> str:
    return card.partition(after)[2].partition(f"```{language}\n")[2].partition("```")[0]


def test_the_card_s_commands_check_the_download_and_build_the_same_bytes(
    build: Build, hub: LoopbackHub, tmp_path: Path
) -> None:
    publish(build().params())
    card = hub.read(REPO, "README.md").decode()
    checked = bash(block(card, "## Check it"), tmp_path)
    assert (checked.returncode, checked.stdout.splitlines()[-1]) == (0, "download: passed, unsigned"), checked.stderr
    rebuilt = bash(block(card, "## Build it again"), tmp_path)
    assert rebuilt.returncode == 0, rebuilt.stderr
    promised = card.partition("come to these sha256:")[2].partition("```\n")[2].partition("```")[0]
    assert len(promised.splitlines()) == 2
    summed = bash(f"cd OUT && sha256sum --check <<'END'\n{promised}END\n", tmp_path)
    assert summed.returncode == 0, summed.stdout


def test_the_card_s_snippet_runs_as_it_stands(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against pocket, from the Hub; without torchvision the line that the README names goes before it."""
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project", monkeypatch, [])
    project.build()
    publish(project.params())
    card = hub.read(REPO, "README.md").decode()
    script = block(card, "\n# merged", "python")
    (tmp_path / "snippet.py").write_text(
        "from lora_fuse.pictures.render import allow_missing_torchvision\nallow_missing_torchvision()\n" + script
    )
    done = bash("python snippet.py", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    made = np.asarray(Image.open(tmp_path / "output.png").convert("RGB"), dtype=float)
    assert made.shape == (128, 128, 3)
    rabbit = made[40:110, 48:80].mean((0, 1))
    assert rabbit[2] > rabbit[1] + 20  # the rabbit of the case is purple: more blue than green
    assert made.std() > 30
