"""A project that is ready to be published: real locks, merge and verification, keys; only the pictures are drawn."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from lora_fuse.cli import main
from lora_fuse.fusion.manifest import read_manifest
from lora_fuse.machine.files import hash_file, replace_text
from lora_fuse.pictures.cases import Case
from lora_fuse.pictures.metrics import METRICS
from lora_fuse.pictures.picture import Picture, levels_of, read_levels
from lora_fuse.recipe.paths import GOLDEN
from lora_fuse.recipe.paths import HERE as at  # noqa: N811
from lora_fuse.recipe.recipe import Recipe
from lora_fuse.recipe.records import to_json
from lora_fuse.regression.candidates import Candidate, Candidates, CaseRecord, PictureInputs
from lora_fuse.regression.case_judgement import Measured, judge_measured
from lora_fuse.regression.exported.export_records import exports_of, flat_exports, places_of
from lora_fuse.regression.exported.export_verdicts import (
    ExportedCase,
    JudgedExport,
    Measures,
    WeightFigures,
    limits_of,
    verdict_of,
)
from lora_fuse.regression.goldens import Goldens
from lora_fuse.regression.recorded_numbers import MEASURED_AGAIN
from lora_fuse.regression.review import flat_metrics
from lora_fuse.regression.verdicts import CaseResult, Comparison, Facts, Golden, Rules, Verdict
from stages.download import download
from stages.export import export_formats
from stages.fuse import fuse
from stages.verify import verify as verify_stage
from tests.hub_server import LoopbackHub
from tests.support import tiny
from tests.support.approved import APPROVAL, KEY, run_record
from tests.support.composed import recipe_of

ROOT = Path(__file__).resolve().parents[2]
REPO = "alice/merged"


class Project:
    """A project's folder, which is the current one."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str]) -> None:
        """`overrides` are those of the recipe."""
        self.root, self._patch, self._overrides = root, monkeypatch, list(overrides)
        (root / "pocket").symlink_to(ROOT / "pocket")

    @classmethod
    def of_local_files(cls, root: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Self:
        """A project with a tiny base and LoRA in folders of its own; there is no Hub."""
        tiny_base(root / "base", "mit")
        tiny_lora(root / "lora", "mit")
        given = ["base.path=base", "loras.lightning.path=lora", f"loras.lightning.filename={LORA_FILE}"]
        return cls(root, monkeypatch, [*given, *overrides])

    def params(self, *overrides: str) -> Recipe:
        """The parameters, composed from `conf/`."""
        self._patch.chdir(self.root)
        published = ("publish.enabled=true", f"publish.repo_id={REPO}", "publish.private=false")
        return recipe_of(*self._overrides, *published, *overrides)

    def build(self) -> None:
        params = self.params()
        for stage in (download, fuse, verify_stage):
            assert stage(params) == 0
        leave_regression(params)


def leave_regression(params: Recipe) -> None:
    """The files of `stages.regress` with drawn pictures, which are approved."""
    _, manifest_sha256 = read_manifest(at.manifest)
    for folder in (at.regression, GOLDEN / params.name):
        shutil.rmtree(folder, ignore_errors=True)
    at.images.mkdir(parents=True)
    found = {}
    results = []
    for number, case in enumerate(Case.of(params)):
        picture, unfused = drawn(case, number)
        (at.images / f"{case.name}.merged.png").write_bytes(picture.png)
        (at.images / f"{case.name}.unfused.png").write_bytes(unfused.png)
        found[case.name] = candidate(case, picture.png, params, manifest_sha256)
        Goldens(GOLDEN / params.name).approve(picture.png, found[case.name], run_record(), APPROVAL)
        results.append(judged(case, picture, unfused, params))
    metrics = flat_metrics(results) | {"environment": str(KEY), "scale": params.fuse.scale}
    metrics |= {"manifest_sha256": manifest_sha256, "recipe": params.name}
    replace_text(at.metrics, json.dumps(metrics))
    replace_text(at.candidates, to_json(Candidates(1, manifest_sha256, found)))
    replace_text(at.blocks, json.dumps([{"block": "0", "relative_norm": 0.25}, {"block": "1", "relative_norm": 0.1}]))


def leave_exports(params: Recipe) -> None:
    """The exports that a recipe asks for, and what `stages.regress` says of ones that draw the merged pictures."""
    assert export_formats(params) == 0
    listed = exports_of(at).files
    limits = limits_of(params)
    judged = []
    cases = {}
    for case in Case.of(params):
        merged = at.images / f"{case.name}.merged.png"
        for name in limits:
            shutil.copy(merged, at.images / f"{case.name}.{name}.png")
        facts = Facts.of(Picture(read_levels(merged)))
        cases[case.name] = ExportedCase(facts, Comparison(BEST), Comparison(FLOOR))
    for name, place in places_of(params).items():
        measures = Measures(WeightFigures(relative_l2=0.0, worst_l2=0.0), cases)
        verdict, reasons = verdict_of(measures, limits[name], params.regress.over_floor)
        assert verdict is Verdict.EXACT, reasons
        judged.append(JudgedExport(name, place, listed[place], measures, verdict, reasons, limits[name]))
    metrics = json.loads(at.metrics.read_text())
    replace_text(at.metrics, json.dumps(metrics | flat_exports(judged)))


BEST = {name: metric.best for name, metric in METRICS.items()}
FLOOR = {**BEST, "psnr_db": 70.0, "max_abs": 1.0, "latents_l2": 1e-4}


def drawn(case: Case, number: int) -> tuple[Picture, Picture]:
    """A picture of two colours, of the size asked for, and the same with 1.5 % of its values one level brighter."""
    levels = levels_of(Image.new("RGB", (case.width or 48, case.height or 32), (40 * number, 90, 200)))
    levels = levels.copy()
    levels[:8] = 30
    unfused = levels.copy()
    unfused.reshape(-1)[: round(levels.size * 0.01456)] += 1
    return Picture(levels), Picture(unfused)


def judged(case: Case, picture: Picture, unfused: Picture, params: Recipe) -> CaseResult:
    """The case as a run judges it, the metrics that take time left at their best: 66.5 dB, 0.75 floors, the golden."""
    quick = {name: float(METRICS[name].measure(picture.levels, unfused.levels)) for name in MEASURED_AGAIN}
    golden = Golden(picture.levels, name=f"{case.name}.png", floor={})
    apart = Comparison(BEST | quick | {"latents_l2": 0.75e-4})
    measured = Measured(apart, Comparison(FLOOR), Comparison(BEST), golden)
    facts = {"merged": Facts.of(picture), "unfused": Facts.of(unfused)}
    result = judge_measured(case, facts, measured, Rules.of(params), {"merged": visited(params)})
    assert result.verdict is Verdict.EXACT, result.reasons
    return result


def visited(params: Recipe) -> tuple[float, ...]:
    return (*(params.sampling.sigmas or [1.0]), 0.0)


def candidate(case: Case, picture: bytes, params: Recipe, manifest_sha256: str) -> Candidate:
    import hashlib

    inputs = PictureInputs(
        recipe=params.name,
        base="base",
        base_sha256="5" * 64,
        loras=(),
        manifest_sha256=manifest_sha256,
        pipeline=params.base.pipeline,
        case=CaseRecord(case.name, case.prompt, case.seed, inputs_of(case), case.height, case.width),
        steps=params.sampling.steps,
        true_cfg_scale=params.sampling.true_cfg_scale,
        negative_prompt=params.sampling.negative_prompt,
        scheduler={},
        sigmas=visited(params),
    )
    floor = {name: value for name, value in FLOOR.items() if math.isfinite(value)}
    return Candidate(hashlib.sha256(picture).hexdigest(), True, (), floor, inputs)


def inputs_of(case: Case) -> dict[str, str]:
    return {path.as_posix(): hash_file(path).sha256 for path in case.images}


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
