"""A project that is ready to be published: real locks, merge and verification, keys; only the pictures are drawn."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from lora_fuse.cli import main
from lora_fuse.fusion.manifest import read_manifest
from lora_fuse.machine.files import replace_text
from lora_fuse.pictures.cases import Case
from lora_fuse.pictures.encode import png
from lora_fuse.pictures.metrics import METRICS
from lora_fuse.pictures.picture import levels_of
from lora_fuse.recipe.paths import HERE as at  # noqa: N811
from lora_fuse.recipe.recipe import Recipe
from lora_fuse.recipe.records import to_json
from lora_fuse.regression.candidates import Candidate, Candidates, CaseRecord, PictureInputs
from stages.config import compose
from stages.download import download
from stages.fuse import fuse
from stages.verify import verify as verify_stage
from tests.hub_server import LoopbackHub
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
REPO = "alice/merged"


class Project:
    """A project's folder, which is the current one."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str]) -> None:
        """`overrides` are those of the recipe."""
        self.root, self._patch, self._overrides = root, monkeypatch, list(overrides)
        (root / "pocket").symlink_to(ROOT / "pocket")

    def params(self, *overrides: str) -> Recipe:
        """The parameters, composed from `conf/`."""
        with self._patch.context() as patch:
            patch.chdir(ROOT)
            tree = compose(
                [
                    *self._overrides,
                    "publish.enabled=true",
                    f"publish.repo_id={REPO}",
                    "publish.private=false",
                    *overrides,
                ]
            )
        self._patch.chdir(self.root)
        return Recipe.parse(tree, "test")

    def build(self) -> None:
        params = self.params()
        for stage in (download, fuse, verify_stage):
            assert stage(params) == 0
        leave_regression(params)


def leave_regression(params: Recipe) -> None:
    """The files of `stages.regress` with drawn pictures."""
    _, manifest_sha256 = read_manifest(at.manifest)
    shutil.rmtree(at.regression, ignore_errors=True)
    at.images.mkdir(parents=True)
    metrics: dict[str, object] = {"passed": True, "verdict": "exact", "environment": "cpu-test"}
    found = {}
    for number, case in enumerate(Case.of(params)):
        picture = png(levels_of(Image.new("RGB", (48, 32), (40 * number, 90, 200))))
        (at.images / f"{case.name}.merged.png").write_bytes(picture)
        found[case.name] = candidate(case, picture, params, manifest_sha256)
        metrics |= {f"{case.name}.verdict": "exact", f"{case.name}.over_floor": 0.75}
        for pair in ("golden", "unfused"):
            metrics |= {f"{case.name}.{pair}.{metric}": None for metric in METRICS}
            metrics |= {f"{case.name}.{pair}.identical": pair == "golden"}
        metrics |= {f"{case.name}.unfused.psnr_db": 66.5}
    metrics |= {"manifest_sha256": manifest_sha256, "recipe": params.name}
    replace_text(at.metrics, json.dumps(metrics))
    replace_text(at.candidates, to_json(Candidates(1, manifest_sha256, found)))
    replace_text(at.blocks, json.dumps([{"block": "0", "relative_norm": 0.25}, {"block": "1", "relative_norm": 0.1}]))


def candidate(case: Case, picture: bytes, params: Recipe, manifest_sha256: str) -> Candidate:
    import hashlib

    inputs = PictureInputs(
        recipe=params.name,
        base="base",
        base_sha256="5" * 64,
        loras=(),
        manifest_sha256=manifest_sha256,
        pipeline=params.base.pipeline,
        case=CaseRecord(case.name, case.prompt, case.seed, {}, case.height, case.width),
        steps=params.sampling.steps,
        true_cfg_scale=params.sampling.true_cfg_scale,
        negative_prompt=params.sampling.negative_prompt,
        scheduler={},
        sigmas=(1.0, 0.0),
    )
    return Candidate(hashlib.sha256(picture).hexdigest(), True, (), {}, inputs)


WEIGHTS = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
LORA_FILE = "lightning/l.safetensors"


def private_key(path: Path, key: Any = None, password: bytes | None = None) -> Path:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem = (key or ec.generate_private_key(ec.SECP256R1())).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    path.write_bytes(pem)
    return path


def public_key(private: Path) -> Path:
    key = serialization.load_pem_private_key(private.read_bytes(), None).public_key()
    path = private.with_suffix(".pub")
    path.write_bytes(key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return path


def tiny_base(folder: Path, licence: str | None) -> Path:
    tiny.write_pipeline(folder, tiny.weights())
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer": ["diffusers", "Tiny"], "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vae/diffusion_pytorch_model.bin").unlink()
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n" if licence else "no front matter\n")
    (folder / "transformer/config.json").write_text('{"_class_name": "QwenImageTransformer2DModel"}')
    return folder


def tiny_lora(folder: Path, licence: str | None) -> Path:
    tiny.write_lora(folder / LORA_FILE, tiny.lora_tensors())
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n" if licence else "")
    return folder


def on_the_hub(hub: LoopbackHub, tmp_path: Path, base: str | None, lora: str | None) -> list[str]:
    """Push a base and a LoRA, and the overrides that name them."""
    for repo_id, folder in (
        ("carol/base", tiny_base(tmp_path / "base", base)),
        ("dave/lora", tiny_lora(tmp_path / "lora", lora)),
    ):
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        hub.push(repo_id, files)
        shutil.rmtree(folder)
    return [
        *("base.path=null", "base.repo_id=carol/base", "base.revision=main"),
        *("loras.lightning.path=null", "loras.lightning.repo_id=dave/lora", "loras.lightning.revision=main"),
        f"loras.lightning.filename={LORA_FILE}",
    ]


Build = Callable[..., Project]


def verify(*arguments: object) -> int:
    return main(["verify", *map(str, arguments)])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
