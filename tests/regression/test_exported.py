"""Laws of exports that are judged: right ones pass in every format, and every wrong exporter fails."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.exports.export_contents import ExportOptions
from lora_fuse.exports.formats import FORMATS, export
from lora_fuse.fusion.merge import write_merged
from lora_fuse.fusion.plan import make_plan
from lora_fuse.lora.inputs import LoraInput
from lora_fuse.machine.files import FileRecord
from lora_fuse.machine.parsing import parse_yaml
from lora_fuse.pictures.picture import Picture
from lora_fuse.recipe.recipe import Recipe
from lora_fuse.regression.exported.export_records import flat_exports
from lora_fuse.regression.exported.export_table import export_rows, trade_off
from lora_fuse.regression.exported.export_verdicts import (
    ExportedCase,
    ExportLimits,
    JudgedExport,
    Measures,
    WeightFigures,
    verdict_of,
)
from lora_fuse.regression.exported.measured_export import Meant, figures_of
from lora_fuse.regression.exported.weight_noise import kept_noise, tensor_noise
from lora_fuse.regression.gate import case_names, failed_exports
from lora_fuse.regression.verdicts import Comparison, Facts, Verdict, compare
from tests.support.judgements import SAME, latents, noisy, scene
from tests.support.machine import ROOT
from tests.support.wrong_exports import WRONG, wrong_export

LORA = ROOT / "pocket/lora/pocket-lightning-4steps-v2.safetensors"
# Blocks of 32 do not divide pocket's 120 columns.
OF_120 = {"gguf_q8_0": ("transformer_blocks.*.attn.*", "*_mlp.net.0.proj")}
ENCODED = [name for name, one in FORMATS.items() if one.ggml is None or one.codec is not None]


@pytest.fixture(scope="module")
def limits() -> Mapping[str, ExportLimits]:
    recipe = Recipe.parse(parse_yaml((ROOT / "params.yaml").read_text()), "params.yaml")
    return {name: {str(key): bound for key, bound in bounds.items()} for name, bounds in recipe.regress.exports.items()}


@pytest.fixture(scope="module")
def meant(tmp_path_factory: pytest.TempPathFactory) -> Meant:
    """Pocket's merge, as of a model that has the flag."""
    merged = tmp_path_factory.mktemp("exported") / "merged"
    plan = make_plan(open_checkpoint(ROOT / "pocket/model"), [LoraInput("l", LORA, 1.0)])
    write_merged(plan, merged, device="cpu", generated={}, known={}, progress=lambda _: None)
    config = merged / "transformer/config.json"
    settings = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps(settings | {"zero_cond_t": True}))
    return Meant.of(plan, merged)


def decided(name: str, path: Path, meant: Meant, options: ExportOptions, bounds: ExportLimits) -> tuple[Verdict, str]:
    figures, problems = figures_of(name, path, meant, options)
    verdict, reasons = verdict_of(Measures(figures, {}, problems), bounds, None)
    return verdict, " ".join(reasons)


@pytest.mark.parametrize("name", ENCODED)
def test_every_format_passes_by_its_weights(
    tmp_path: Path, name: str, meant: Meant, limits: Mapping[str, ExportLimits]
) -> None:
    options = ExportOptions(OF_120.get(name, ()), matrix=meant.exact)
    made = export(meant.checkpoint, tmp_path, [name], name="x", metadata={}, progress=lambda _: None, options=options)
    expected = Verdict.EXACT if name == "single_file" else Verdict.DRIFT
    assert decided(name, tmp_path / next(iter(made)), meant, options, limits[name]) == (expected, "")


SAID = {
    "unscaled fp8": "from what the format makes",
    "LoRA added to codes": "of the LoRA is left",
    "quantised first, fused after": "relative L2 error of a matrix is 0.036",
    "int8 under scaled_fp8": "readers stumble",
    "missing flag": "__index_timestep_zero__ is missing",
    "scale rounded to bf16": "from what the format makes",
    "one scale doubled": "relative L2 error of a matrix is 1",
    "nibbles swapped": "relative L2 error of a matrix is 1.4",
    "keep-list ignored": "tensors that the format keeps are not the merged ones",
    "group size wrong": "relative L2 error of a matrix is 1",
}


@pytest.mark.parametrize("name", WRONG)
def test_every_wrong_exporter_fails_by_its_weights_or_its_header(
    tmp_path: Path, name: str, meant: Meant, limits: Mapping[str, ExportLimits]
) -> None:
    path = wrong_export(name, meant.checkpoint, tmp_path, base=meant.base, exact=meant.exact)
    kind = WRONG[name].format
    verdict, reasons = decided(kind, path, meant, ExportOptions(matrix=meant.exact), limits[kind])
    assert (verdict, SAID[name] in reasons) == (Verdict.REGRESSION, True), reasons


def test_what_was_quantised_from_the_merge_is_told_from_what_was_quantised_from_the_sum(
    tmp_path: Path, meant: Meant, limits: Mapping[str, ExportLimits]
) -> None:
    made = export(meant.checkpoint, tmp_path, ["int8_convrot"], name="x", metadata={}, progress=lambda _: None)
    path = tmp_path / next(iter(made))
    verdict, reasons = decided("int8_convrot", path, meant, ExportOptions(), limits["int8_convrot"])
    assert (verdict, "from what the format makes" in reasons) == (Verdict.REGRESSION, True)


def test_a_tensor_s_numbers_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(0)
    base, delta, noise = (rng.normal(0, size, (30, 40)).astype(np.float32) for size in (1, 0.1, 0.01))
    found = tensor_noise(
        "w", base + delta + noise, base + delta, base=base, best=base + delta + noise * np.float32(0.5)
    )
    assert found.relative_l2 == pytest.approx(np.linalg.norm(noise) / np.linalg.norm(base + delta), rel=1e-3)
    assert found.from_best == pytest.approx(1, rel=1e-3)
    assert found.error / found.update == pytest.approx((np.linalg.norm(noise) / np.linalg.norm(delta)) ** 2, rel=1e-3)
    assert found.overlap / found.update == pytest.approx(1 + (noise * delta).sum() / (delta**2).sum(), rel=1e-3)
    lost = tensor_noise("w", base, base + delta, base=base)
    assert (lost.overlap, lost.realised, lost.from_best) == (0, 0, None)
    assert kept_noise("w", base, base).changed == 0
    assert kept_noise("w", base + delta, base).changed == base.size


def case(levels: int = 0, noise: float = 0.0, nonfinite: int = 0) -> ExportedCase:
    """A picture that is so far from the merged one, its latents in floors."""
    picture = Picture(noisy(scene(), levels), nonfinite, latents=latents(noise * 1e-3))
    compared = compare(picture, Picture(scene(), latents=latents()))
    return ExportedCase(Facts.of(picture), compared, Comparison({**SAME.values, "latents_l2": 1e-3}))


NO_ERROR = WeightFigures(relative_l2=0.0, worst_l2=0.0)
BOUNDS = {"over_floor": 5.0, "psnr_db": 40.0}
PICTURES = {
    "the same": (case(), Verdict.EXACT, ""),
    "near": (case(1, 2), Verdict.DRIFT, ""),
    "far by its latents": (case(1, 9), Verdict.REGRESSION, "times the noise floor from the merged ones, above 5"),
    "far by its levels": (case(9, 2), Verdict.REGRESSION, "PSNR to the merged picture is"),
    "none": (ExportedCase(), Verdict.REGRESSION, "no picture a that could be compared"),
    "broken": (case(nonfinite=3), Verdict.INVALID, "3 values that are NaN or infinite"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_judged_by_the_format_s_limits(name: str) -> None:
    picture, expected, said = PICTURES[name]
    verdict, reasons = verdict_of(Measures(NO_ERROR, {"a": picture}), BOUNDS, 2.0)
    assert verdict is expected
    assert said in " ".join(reasons)


def judged(name: str, error: float, picture: ExportedCase) -> JudgedExport:
    measures = Measures(WeightFigures(relative_l2=error, worst_l2=error), {"a": picture})
    verdict, reasons = verdict_of(measures, BOUNDS, 2.0)
    return JudgedExport(name, f"{name}.x", FileRecord(7, "5" * 64), measures, verdict, reasons, BOUNDS)


def test_metrics_name_the_file_that_was_judged_and_no_case() -> None:
    flat = flat_exports([judged("int8", 0.01, case(1, 2)), judged("fp8", float("nan"), case(9, 9))])
    assert (flat["exports.int8.sha256"], flat["exports.int8.bytes"]) == ("5" * 64, 7)
    assert (flat["exports.int8.verdict"], flat["exports.fp8.verdict"]) == ("drift", "regression")
    assert flat["exports.fp8.relative_l2"] is None
    assert flat["exports.int8.a.over_floor"] == pytest.approx(2, rel=0.3)
    assert (case_names(flat), failed_exports(flat)) == ([], ["fp8"])
    json.dumps(flat, allow_nan=False)


def test_the_table_has_a_column_for_each_and_the_plot_a_point() -> None:
    exports = [judged("int8", 0.01, case(1, 2)), judged("fp8", 0.1, case(9, 9))]
    rows = {(row.case, row.title): row.cells for row in export_rows(exports)}
    assert [cell.holds for cell in rows["a", "latents over the floor"]] == [True, False]
    assert {len(cells) for cells in rows.values()} == {2}
    plot = trade_off(exports)
    assert plot is not None
    near, far = plot.marks
    assert (near.label, far.label, near.y > far.y, near.passed, far.passed) == ("int8", "fp8", True, True, False)
    assert trade_off(exports[:1]) is None
