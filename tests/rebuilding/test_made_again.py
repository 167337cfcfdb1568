"""A published checkpoint is made again byte for byte, from the Hub and from a folder, or nothing is."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_fuse.cli import main
from lora_fuse.fusion import FuseJob, plan_base
from lora_fuse.fusion.manifest import read_manifest
from lora_fuse.hub import lock_base
from lora_fuse.lora.inputs import LoraInput, Selection
from lora_fuse.recipe.records import MergedFile, ReleaseList, Tool, from_json, to_json
from lora_fuse.release.contents import LIST, PROVENANCE, named, write_release
from lora_fuse.release.recipe_only import left_out
from lora_fuse.release.signing import SIGNATURE
from lora_fuse.release.slsa import provenance_json
from tests.hub_server import Fault
from tests.support import codes, merges, tiny
from tests.support.machine import until
from tests.support.recipes import FULL, Published
from tests.support.released import LORA_FILE, REPO, WEIGHTS, flip, private_key, public_key, verify

SECOND = WEIGHTS.replace("00001-of", "00002-of")


ENDS = ("lora_down.weight", "lora_up.weight", "alpha")


def rebuild(*arguments: object) -> int:
    return main(["rebuild", *map(str, arguments)])


def cached(published: Published, repository: str) -> Path:
    """The files of a repository in the cache of who published."""
    (folder,) = (published.root / f"home/hub/models--{repository.replace('/', '--')}/snapshots").iterdir()
    return folder


@pytest.fixture
def sources(published: Published) -> list[object]:
    """Options that need no Hub."""
    lora = cached(published, "dave/lora") / LORA_FILE
    return ["--base", cached(published, "carol/base"), "--lora", f"lightning={lora}"]


def test_from_the_hub_after_a_kill_the_same_command_makes_every_byte_and_the_base_never_lies_here(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    base = published.hub.registry.repos["carol/base"].head.tree
    published.hub.faults.append(Fault(f"GET /_lfs/{base[SECOND].sha256}", skip=1, times=-1, delay=8.0))
    given = [f"{REPO}@v1", out, "--public-key", published.public, "--repository", REPO, "--tag", "v1"]
    command = [sys.executable, "-m", "lora_fuse", "rebuild", *map(str, given)]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}, text=True) as process:
        until(lambda: bool(list(tmp_path.glob(f".out.partial-*/done/{WEIGHTS}.json"))), process)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    published.hub.faults.clear()
    capsys.readouterr()
    assert rebuild(f"hf://{given[0]}", *given[1:]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"rebuild: {REPO}@")
    assert ", signature right\n" in said
    assert "each with the sha256 of the list; base streamed from the Hub" in said
    merged = merges.hashes(published.root / "project/artifacts/merged")
    assert merged.items() < merges.hashes(out).items()
    assert merges.hashes(out).keys() == {*published.listing.files, LIST, SIGNATURE}
    kept = read_manifest(tmp_path / "out.manifest.json")[0]
    assert kept.loras == published.listing.loras
    assert published.listing.files.items() < kept.files.items()
    assert not list((published.root / "elsewhere").rglob("vae/*.safetensors"))
    assert merges.left(tmp_path) == []
    assert verify(out, "--public-key", published.public) == 0
    assert verify(out, "--tag", "v2") == 1


def test_a_repository_with_weights_and_a_folder_give_the_same_and_a_second_run_replaces_the_first(
    published: Published, sources: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = published.folder(tmp_path / "full", FULL)
    for name in (WEIGHTS, SECOND):
        (full / name).unlink()  # nobody needs them
    for _ in range(2):
        assert rebuild(full, tmp_path / "out", "--public-key", published.public, "--json", *sources) == 0
        facts = json.loads(capsys.readouterr().out)
    merged = merges.hashes(published.root / "project/artifacts/merged")
    assert facts["files"] == merged
    assert (facts["signature"], facts["repository"], facts["tag"]) == ("signature right", FULL, None)
    assert merged.items() < merges.hashes(tmp_path / "out").items()
    listing = from_json(ReleaseList, (full / LIST).read_text(), LIST)
    export = {"diffusion_models/x.safetensors": MergedFile(1, "5" * 64, "generated")}
    (full / LIST).write_text(to_json(replace(listing, files=listing.files | export)))
    assert rebuild(full, tmp_path / "out", *sources) == 0
    said = "note: diffusion_models/x.safetensors is an export, and not made again; hf download alice/full diffusion_mod"
    assert said in capsys.readouterr().out


Change = Callable[[ReleaseList], ReleaseList]


def of_lora(**changes: Any) -> Change:
    return lambda listing: replace(listing, loras=(replace(listing.loras[0], **changes),))


def of_base(**changes: Any) -> Change:
    return lambda listing: replace(listing, base=replace(listing.base, **changes))  # type: ignore[type-var]


def with_file(name: str) -> Change:
    return lambda listing: replace(listing, files=listing.files | {name: MergedFile(1, "5" * 64, "base")})


def with_base_file(name: str) -> Change:
    def changed(listing: ReleaseList) -> ReleaseList:
        assert listing.base is not None
        record = next(iter(listing.base.files.values()))
        return replace(listing, base=replace(listing.base, files=listing.base.files | {name: record}))

    return changed


WRONG: dict[str, tuple[Change, list[str]]] = {
    "scale": (of_lora(scale=0.9), [f"{WEIGHTS} came out with sha256 ", f"{LIST} of ", " says ", "nothing was kept"]),
    "file": (with_file("vae/more.json"), ["vae/more.json came out with sha256 none", f"says {'5' * 64}"]),
    "path": (with_file("../more.json"), ["names '../more.json', which leads out of the folder"]),
    "absolute": (with_file("/etc/more.json"), ["names '/etc/more.json', which leads out of the folder"]),
    "absent": (lambda listing: replace(listing, absent=("a/../../b",)), ["names 'a/../../b', which leads out of"]),
    "base": (with_base_file("../../b.json"), ["names '../../b.json', which leads out of the folder"]),
    "pickle": (with_base_file("unet/x.bin"), ["names 'unet/x.bin', a pickle"]),
    "lora": (of_lora(filename="../l.safetensors"), ["names '../l.safetensors', which leads out of the folder"]),
    "repository": (of_base(repo_id="../../other"), ["names '../../other', which is no repository"]),
    "branch": (of_base(revision="main"), ["has carol/base at 'main', which is no commit"]),
    "snapshot": (of_base(revision="../../../x"), ["at '../../../x', which is no commit"]),
    "other lora": (of_lora(sha256="5" * 64), ["l.safetensors has sha256 ", f"made of lightning with {'5' * 64}"]),
    "no base": (lambda listing: replace(listing, base=None), ["does not say which base it was made of"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_list_that_is_wrong_is_refused_in_one_line_and_nothing_is_left(
    published: Published, sources: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    change, words = WRONG[what]
    folder = published.folder(tmp_path / "recipe")
    (folder / LIST).write_text(to_json(change(from_json(ReleaseList, (folder / LIST).read_text(), LIST))))
    capsys.readouterr()
    for more in ([], ["--public-key", published.public]):
        assert rebuild(folder, tmp_path / "out", *sources, *more) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        is_path = words[0].startswith(("names", "has", "at", "does"))
        expected = words if is_path or not more else [f"{SIGNATURE} is no signature of these files"]
        assert [word for word in expected if word not in line] == [], line
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".out.lock") == ["recipe"]


def test_who_signed_is_looked_at_before_anything_else_and_the_release_is_the_one_asked_for(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published.folder(tmp_path / "recipe")

    def refused(*more: object) -> str:
        before = len(published.hub.log)
        assert rebuild(folder, tmp_path / "out", *more) == 2
        assert len(published.hub.log) == before
        return capsys.readouterr().err.splitlines()[-1]

    other = public_key(private_key(tmp_path / "other.pem"))
    assert f"{SIGNATURE} is no signature of these files by the key of {other}" in refused("--public-key", other)
    assert "names the tag v1, expected v2" in refused("--tag", "v2")
    flip(folder / "README.md")
    assert "README.md of " in (line := refused("--public-key", published.public))
    assert f"and {LIST} says {published.listing.files['README.md'].sha256}" in line
    (folder / SIGNATURE).unlink()
    assert "is not signed, and a signature is asked for" in refused("--public-key", published.public)
    (folder / LIST).write_text("{}")
    assert f"{LIST} of {folder} is no list of files" in refused()
    (folder / LIST).unlink()
    assert f"{folder} has no {LIST}" in refused()
    for place in ("nothing", ""):
        assert rebuild(place, tmp_path / "out") == 2
        assert f"{place!r} is no folder here, and no repository's name" in capsys.readouterr().err


def test_another_base_or_lora_is_refused_by_name(
    published: Published, sources: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published.folder(tmp_path / "recipe")
    base = Path(shutil.copytree(cached(published, "carol/base"), tmp_path / "base"))

    def refused(*more: object) -> str:
        assert rebuild(folder, tmp_path / "out", *more) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err.splitlines()[-1]

    lora = sources[2:]
    flip(base / "vae/diffusion_pytorch_model.safetensors")
    assert "vae/diffusion_pytorch_model.safetensors came out with sha256 " in refused("--base", base, *lora)
    (base / "vae/config.json").write_text("{ }\n")
    assert f"--base {base}: vae/config.json has 4 bytes, and the base has 3 bytes" in refused("--base", base, *lora)
    (base / "vae/config.json").unlink()
    assert "vae/config.json is not there" in refused("--base", base, *lora)
    other = tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors(seed=8))
    assert f"and {folder} was made of lightning with" in refused(*sources[:2], "--lora", f"lightning={other}")
    assert "the LoRAs of" in refused(*sources[:2], "--lora", f"thunder={other}")
    assert "names no file; give each LoRA of the list once, NAME=FILE" in refused("--lora", str(other))


class Recipe:
    """A recipe that was never on a Hub: its base and LoRAs are here."""

    def __init__(self, root: Path, base: Path, loras: list[LoraInput], **how: Any) -> None:
        scheduler = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
        lock = lock_base(tiny.in_folder(base), previous=None)
        plan = plan_base(base, loras, how.pop("selection", None), names=lock.files, **how)
        job = FuseJob(plan, root / "merged", pipeline="OtherPipeline", scheduler=scheduler, force_quantised=True)
        made = job.run(base=lock).manifest
        parameters = {"base": {"pipeline": "OtherPipeline"}, "scheduler": scheduler, "fuse": {}}
        tool = Tool("1")
        statement = provenance_json(made, {}, parameters=parameters, tool=tool, repository=None)
        release = named(made, "alice/own", None, tool)
        texts = {PROVENANCE: statement.encode()}
        self.folder = root / "recipe"
        write_release(self.folder, root / "merged", release, texts, {}, None, left_out(made, {}))
        self.sources = ["--base", str(base)]
        for lora in loras:
            self.sources += ["--lora", f"{lora.name}={lora.path}"]
        self.made = made


def test_components_selection_and_scheduler_are_those_of_the_records(tmp_path: Path) -> None:
    base = tiny.write_pipeline(tmp_path / "base", tiny.weights())
    (base / "vae/diffusion_pytorch_model.bin").unlink()
    index = json.loads((base / "model_index.json").read_text())
    index |= {"transformer": ["diffusers", "Tiny"], "transformer_2": ["diffusers", "Tiny"]}
    (base / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
    tiny.write_component(base / "transformer_2", tiny.weights(seed=1), shards=1)
    loras: list[LoraInput] = []
    for name, component in (("a", "transformer"), ("b", "transformer_2")):
        tensors = tiny.lora_tensors(seed=len(loras) + 2)
        more = {f"blocks.9.k_img.{end}": tensors[f"transformer_blocks.0.attn.to_q.{end}"] for end in ENDS}
        loras.append(LoraInput(name, tiny.write_lora(tmp_path / f"{name}.safetensors", tensors | more), 0.5, component))
    chosen = Selection(("*.attn.*",), ("*blocks.1.*",), {"*.to_q*": 0.25}, ("*.k_img.*",))
    recipe = Recipe(tmp_path, base, loras, selection=chosen)
    assert recipe.made.components is not None
    assert recipe.made.selection == chosen
    assert rebuild(recipe.folder, tmp_path / "out", *recipe.sources) == 0
    assert merges.hashes(tmp_path / "merged").items() < merges.hashes(tmp_path / "out").items()
    kept = read_manifest(tmp_path / "out.manifest.json")[0]
    assert (kept.loras, kept.selection, kept.components) == (recipe.made.loras, chosen, recipe.made.components)


@pytest.mark.parametrize("how", [{}, {"requantise": True}, {"dtype": "float32"}], ids=["decoded", "again", "float32"])
def test_weights_that_are_codes_are_decoded_or_quantised_as_they_were(tmp_path: Path, how: dict[str, Any]) -> None:
    base = tiny.write_pipeline(tmp_path / "base", tiny.weights())
    shutil.rmtree(base / "transformer")
    tensors, _ = codes.tensors("comfy_quant float8_e4m3fn")
    tiny.write_component(base / "transformer", tensors, shards=1)
    lora = LoraInput("l", tiny.write_lora(tmp_path / "l.safetensors", codes.lora()), 0.5)
    recipe = Recipe(tmp_path, base, [lora], **how)
    assert recipe.made.source is not None
    assert rebuild(recipe.folder, tmp_path / "out", *recipe.sources) == 0
    assert merges.hashes(tmp_path / "merged").items() < merges.hashes(tmp_path / "out").items()


def test_a_base_that_is_read_more_than_once_is_fetched_and_then_read_in_the_cache(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published.folder(tmp_path / "recipe")
    text = (folder / LIST).read_text()
    (folder / LIST).write_text(to_json(replace(from_json(ReleaseList, text, LIST), dtype="F32")))
    assert rebuild(folder, tmp_path / "out") == 2
    assert f"{WEIGHTS} came out with sha256 " in capsys.readouterr().err
    (folder / LIST).write_text(text)
    assert rebuild(folder, tmp_path / "out") == 0
    assert "base in the Hub client's cache; written" in capsys.readouterr().out
