"""A release without its weights: small, signed, checked, and a card that says how to make them."""

import dataclasses
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import snapshot_download
from PIL import Image

from lora_fuse.errors import PublishRefused
from lora_fuse.machine.files import FileRecord, hash_file
from lora_fuse.recipe.paths import HERE as at  # noqa: N811
from lora_fuse.recipe.records import Builder, MergedFile, ReleaseList, from_json, to_json
from lora_fuse.release.bom import bom_json
from lora_fuse.release.card import ShownChange, Usage, model_card
from lora_fuse.release.contents import BOM, LIST, PROVENANCE, write_release
from lora_fuse.release.licences import resolve_licence
from lora_fuse.release.recipe_only import MOST, PICTURES, copy_name, left_out, smaller_copies
from lora_fuse.release.regression_evidence import with_copies
from lora_fuse.release.signing import SIGNATURE
from lora_fuse.release.slsa import provenance_json
from stages.publish import publish
from tests.hub_server import LoopbackHub
from tests.support.cards import BASE, EVIDENCE, MANIFEST, TOOL, card, publishing
from tests.support.released import REPO, WEIGHTS, Build, leave_exports, public_key, verify

EXPORT = "diffusion_models/pocket.safetensors"


def test_a_recipe_has_all_but_the_weights_and_is_checked_as_one(
    build: Build, hub: LoopbackHub, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = build()
    params = project.params(
        f"publish.signing.key={key}", "publish.weights=recipe", "publish.tag=v1", "export.formats=[single_file]"
    )
    leave_exports(params)
    capsys.readouterr()
    assert publish(params, dry_run=True) == 0
    assert "a recipe: 3 files with the weights," in capsys.readouterr().out
    publish(params)
    tree = hub.registry.repos[REPO].head.tree
    assert not [name for name in tree if name.endswith(".safetensors")]
    assert {"model_index.json", "transformer/config.json", SIGNATURE, LIST, BOM, PROVENANCE} < tree.keys()
    assert sum(len(hub.read(REPO, name)) for name in tree) < MOST
    fetched = Path(snapshot_download(REPO, endpoint=hub.url, token="hf_write", local_dir=tmp_path / "recipe"))  # noqa: S106
    listing = from_json(ReleaseList, (fetched / LIST).read_text(), LIST)
    assert listing.weights == "recipe"
    assert {WEIGHTS, EXPORT} < {*listing.absent} < listing.files.keys()
    capsys.readouterr()
    assert verify(fetched, "--public-key", public_key(key)) == 0
    said = capsys.readouterr().out
    assert f"a recipe: its weights ({len(listing.absent) - 1} files, " in said
    assert f"note: {EXPORT} is an export, and not there" in said
    assert said.endswith("download: passed, signature right\n")
    text = (fetched / "README.md").read_text()
    assert f"```bash\npython -m lora_fuse rebuild {REPO}@v1 OUT\n```" in text
    assert 'from_pretrained("OUT", dtype=' in text

    (fetched / WEIGHTS).write_bytes((at.merged / WEIGHTS).read_bytes())  # made since
    assert verify(fetched, "--public-key", public_key(key)) == 0
    (fetched / WEIGHTS).write_bytes(b"others")
    assert verify(fetched, "--public-key", public_key(key)) == 1
    assert f"problem: {WEIGHTS}: size 6, expected" in capsys.readouterr().err
    (fetched / WEIGHTS).unlink()
    lora = tmp_path / "none.safetensors"
    assert verify(fetched, "base", "--lora", lora, "--scale", "1") == 2
    assert f"is a recipe, and {len(listing.absent) - 1} files of it are not there" in capsys.readouterr().err
    for wrong in (replace(listing, weights="full"), replace(listing, absent=(*listing.absent, "more.safetensors"))):
        (fetched / LIST).write_text(to_json(wrong))
        assert verify(fetched) == 1


# Files of Qwen/Qwen-Image-Edit-2509 (huggingface.co, files of main): 57.7 GB.
LARGE = {
    **{f"transformer/diffusion_pytorch_model-0000{n}-of-00005.safetensors": 8_172_000_000 for n in range(1, 6)},
    **{f"text_encoder/model-0000{n}-of-00004.safetensors": 4_146_000_000 for n in range(1, 5)},
    "vae/diffusion_pytorch_model.safetensors": 253_806_966,
    "processor/tokenizer.json": 11_421_896,
    "tokenizer/vocab.json": 2_776_833,
    "tokenizer/merges.txt": 1_671_853,
    "transformer/diffusion_pytorch_model.safetensors.index.json": 198_887,
}
SMALL = {
    **{f"{folder}/config.json": 5_000 for folder in ("transformer", "text_encoder", "vae")},
    "text_encoder/model.safetensors.index.json": 57_655,
    **{f"{folder}/{name}.json": 8_000 for folder in ("processor", "tokenizer") for name in ("a", "b", "c", "d", "e")},
    "scheduler/scheduler_config.json": 485,
    "model_index.json": 512,
    "LICENSE": 11_343,
}


def test_the_recipe_of_57_gb_is_smaller_than_a_megabyte(tmp_path: Path) -> None:
    """By the real texts of such a release: 720 targets in the card, every file in list, provenance and bill."""
    sizes = LARGE | SMALL
    assert sum(sizes.values()) > 57e9
    files = {name: MergedFile(size, "5" * 64, "base") for name, size in sizes.items()}
    base = replace(BASE, files={name: FileRecord(size, "5" * 64) for name, size in sizes.items()})
    manifest = replace(MANIFEST, base=base, files=files)
    assert left_out(manifest, {}) == LARGE.keys()
    kept = tuple(ShownChange(f"transformer_blocks.{n}.attn.add_k_proj.weight", 0.9, 0.1) for n in range(720))
    usage, licence = Usage("QwenImageEditPlusPipeline", 4, 1.0, " ", None), resolve_licence(manifest)
    where = publishing("alice/edit", weights="recipe")
    text = model_card(
        manifest, usage=usage, evidence=replace(EVIDENCE, kept=kept), licence=licence, tool=TOOL, publish=where
    )
    assert f"the weights ({len(LARGE)} files, 57.7GB) are not in it" in text, text[:2000]
    texts = {
        "README.md": text,
        PROVENANCE: provenance_json(manifest, {}, parameters={}, tool=TOOL, repository=None),
        BOM: bom_json(manifest, "5" * 64, {}, name="edit", licence=licence.license, usage=usage, figures=[]),
        "images/all.png": "x" * PICTURES,
    }
    parts = {part.name: getattr(manifest, part.name) for part in dataclasses.fields(manifest)}
    release = ReleaseList(**parts, repository="alice/edit", builder=Builder("1"))
    encoded = {name: content.encode() for name, content in texts.items()}
    absent = frozenset(LARGE)
    beside = write_release(tmp_path / "release", tmp_path, release, encoded, {}, None, absent)
    assert sum(record.size for _, record in beside.values()) + sum(SMALL.values()) < MOST
    encoded["README.md"] *= 8
    with pytest.raises(PublishRefused, match=r"without its weights the repository has .*publish\.weights: full"):
        write_release(tmp_path / "release", tmp_path, release, encoded, {}, None, absent)


def test_pictures_that_are_too_large_for_a_recipe_are_smaller_copies(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (500, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "rabbit.png")
    addition = (tmp_path / "rabbit.png", hash_file(tmp_path / "rabbit.png"))
    assert addition[1].size > PICTURES
    copies = smaller_copies({"images/rabbit.png": addition})
    assert sum(map(len, copies.values())) <= PICTURES
    assert Image.open(io.BytesIO(copies["images/rabbit.png"])).format == "WEBP"
    assert smaller_copies({"images/rabbit.png": (addition[0], replace(addition[1], size=PICTURES))}) == {}
    shown = card(evidence=with_copies(EVIDENCE))
    assert f"![rabbit]({copy_name('images/rabbit.png')})" in shown
    assert "smaller copies. This makes nearly the first of them, as the size of its input counts." in shown
