"""A new version of a LoRA: four that are broken or good get four different right answers, on the real model."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_fuse.errors import BadConfig, BadGolden, BadSource
from lora_fuse.hub import lock_base
from lora_fuse.lora import LoraInput
from lora_fuse.machine.console import Console
from lora_fuse.machine.files import FileRecord
from lora_fuse.machine.parsing import parse_yaml
from lora_fuse.recipe.recipe import Recipe
from lora_fuse.recipe.records import Lock
from lora_fuse.regression.goldens import Goldens
from lora_fuse.studies.validation.file_comparison import FileComparison, Kinship, compare_files
from lora_fuse.studies.validation.outcome import CaseEvidence, Cause, Effect, Judgement, Outcome
from lora_fuse.studies.validation.questions import judge
from lora_fuse.studies.validation.several import folder_of
from lora_fuse.studies.validation.sides import effect, gain
from lora_fuse.studies.validation.versions import Version, candidate, misfits, parse_lora
from pocket.candidates import compare, for_another_base, write
from pocket.controls.pictures import grid
from stages.validate import requested, validate, validate_several
from tests.hub_server import LoopbackHub
from tests.support.composed import recipe_of
from tests.support.tiny import in_folder
from tests.tiny_models import tiny
from tests.tiny_models.loras import write_loras

ROOT = Path(__file__).resolve().parents[2]
GOOD = "pocket/lora/pocket-lightning-4steps-v1.safetensors"
CURRENT = "pocket/lora/pocket-lightning-4steps-v2.safetensors"
ONE_CASE = ("recipe=pocket", "~regress.cases.hat")
RECIPE = Recipe.parse(parse_yaml((ROOT / "params.yaml").read_text()), "params.yaml")  # its bounds
CASE = CaseEvidence(
    name="rabbit",
    faults=(),
    apart=(),
    moved=0.3,
    changed=0.01,
    floor=1e-4,
    effect=Effect(0.99, 1.02),
    gain=0.88,
    current_gain=0.89,
    noise=0.7,
    noise_beside=0.7,
    comb_db=1.0,
)
FILES = FileComparison(60, (), (), ratio=1.01, lowest=0.9, highest=1.1, cosine=0.96)


def run(lora: str | None, *, keep: bool = False, overrides: tuple[str, ...] = ONE_CASE, name: str | None = None) -> int:
    return validate(requested(lora, name, None, keep, overrides), Console(quiet=True))


def said(root: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((root / "artifacts/validation/validation.json").read_text())
    return content


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder; the current build in it is a file that nobody may touch."""
    for name in ("pocket", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "artifacts/golden/pocket", tmp_path / "artifacts/golden/pocket")
    (tmp_path / "artifacts/merged").mkdir()
    (tmp_path / "artifacts/merged/model_index.json").write_text("the current build")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield write(tmp_path_factory.mktemp("candidates"))


def test_a_good_version_changed_and_needs_a_reviewer(project: Path) -> None:
    assert run(GOOD) == 4
    found = said(project)
    assert (found["outcome"], found["cause"]) == ("changed", None)
    files = found["files"]
    assert isinstance(files, dict)
    assert files["kinship"] == "version"
    assert [block["block"] for block in files["blocks"]] == ["0", "1", "2", "3", "4"]
    page = (project / "artifacts/validation/validation.md").read_text()
    assert "another version of the same training: cosine 0.961, by block 0.944 to 0.972" in page
    assert page.startswith("# pocket: changed as expected, needs a reviewer\n")
    assert re.search(r"\| Does it act as strongly\? \| 1\.0\d times \|", page)
    assert (project / "artifacts/validation/thumbnails/rabbit.png").stat().st_size > 1000
    html = (project / "artifacts/validation/validation.html").read_text()
    assert "another version of the same training: cosine 0.961" in html
    assert html.count("<img") == 9  # input, five sides, their difference, and two in the slider
    assert "://" not in html  # of nobody's
    junit = (project / "artifacts/validation/junit.xml").read_text()
    assert 'skipped="1"' in junit
    assert 'failures="0"' in junit
    assert (project / "artifacts/merged/model_index.json").read_text() == "the current build"
    assert not (project / "artifacts/validation/build").exists()


def test_a_version_of_a_hub_is_fetched_and_its_commit_is_what_goes_into_the_recipe(
    project: Path, hub: LoopbackHub
) -> None:
    first = hub.push("bob/lora", {"v2/lora.safetensors": (ROOT / CURRENT).read_bytes()})
    commit = hub.push("bob/lora", {"v2/lora.safetensors": (ROOT / GOOD).read_bytes()}).oid
    assert run(f"bob/lora@{first.oid}:v2/lora.safetensors") == 0  # the old one is the current file
    assert run("bob/lora:v2/lora.safetensors") == 4  # main is the new one
    wanted = f"repo_id: bob/lora, revision: {commit}, filename: v2/lora.safetensors into the recipe's loras.lightning"
    assert wanted in str(said(project)["next"])
    with pytest.raises(BadSource, match=r"gone\.safetensors"):
        run("bob/lora:gone.safetensors")


@pytest.mark.parametrize(
    ("name", "cause"), [("alpha_ignored", Cause.SCALE), ("other_base", Cause.BASE), ("no_effect", Cause.NO_EFFECT)]
)
def test_each_broken_version_gets_its_own_answer(
    project: Path, broken: dict[str, Path], name: str, cause: Cause
) -> None:
    assert run(str(broken[name])) == 1
    assert (said(project)["outcome"], said(project)["cause"]) == ("broken", cause)
    assert f"# pocket: broken: {cause}\n" in (project / "artifacts/validation/validation.md").read_text()
    assert 'failures="0"' not in (project / "artifacts/validation/junit.xml").read_text().split("<testsuite ")[0]


def test_what_was_approved_is_the_current_version_where_none_is_named(project: Path) -> None:
    assert run(None, keep=True) == 0
    assert said(project)["outcome"] == "same"
    assert said(project)["current_sha256"] == said(project)["sha256"]
    assert (project / "artifacts/validation/build/merged/model_index.json").is_file()


def test_the_program_s_exit_code_and_its_one_json_object(tmp_path: Path, project: Path) -> None:
    """In a process of its own: a LoRA whose names are another model's."""
    other = {name.replace("transformer_blocks", "blocks"): tensor for name, tensor in load_file(ROOT / CURRENT).items()}
    save_file(other, tmp_path / "other.safetensors")
    command = [sys.executable, "-m", "stages.validate", "other.safetensors", "--recipe", "pocket", "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["cause"] == "wrong base"
    assert "blocks.0.attn" in json.loads(done.stdout)["reason"]
    assert "Traceback" not in done.stderr


def test_several_versions_have_a_report_each_and_the_exit_code_is_the_worst_one_s(
    tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    other = {name.replace("transformer_blocks", "blocks"): tensor for name, tensor in load_file(ROOT / CURRENT).items()}
    save_file(other, tmp_path / "other.safetensors")
    loras = ["other.safetensors", "bob/lora:gone.safetensors"]
    assert validate_several([requested(lora, None, None, False, ONE_CASE) for lora in loras], None, Console()) == 1
    found = json.loads((project / "artifacts/validation/versions.json").read_text())
    assert [(one["version"], one["exit_code"]) for one in found] == [(loras[0], 1), (loras[1], 2)]
    assert (found[0]["cause"], "HF_HUB_OFFLINE" in found[1]["reason"]) == ("wrong base", True)
    table = (project / "artifacts/validation/versions.md").read_text()
    (page,) = (project / "artifacts/validation/versions").glob("*/validation.html")
    assert f"versions/{page.parent.name}/validation.html" in table
    assert "python -m stages.validate other.safetensors bob/lora:gone.safetensors --set" in table
    assert validate_several([requested(loras[1], None, None, False, ONE_CASE)], None, Console(quiet=True)) == 2
    assert not page.exists()  # an answer to another request


def test_a_version_whose_name_is_no_text_has_a_folder() -> None:
    """Names on disk are bytes, which Python escapes."""
    assert folder_of("a\udcff.safetensors").name.startswith("a-")


def test_a_file_that_holds_nan_is_unusable(tmp_path: Path, project: Path) -> None:
    tensors = load_file(ROOT / CURRENT)
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, tmp_path / "nan.safetensors")
    assert run("nan.safetensors") == 1
    assert said(project)["cause"] == "unusable file"


@pytest.mark.parametrize(
    ("lora", "overrides", "error", "text"),
    [
        ("nowhere.safetensors", ONE_CASE, BadConfig, "neither a file or folder here nor owner/name"),
        (GOOD, ("recipe=pocket_pastel",), BadConfig, "has the LoRAs lightning, pastel, and none is chosen"),
        (GOOD, ("recipe=nothing",), BadConfig, "nothing"),
        (GOOD, (*ONE_CASE, "loras.lightning.filename=gone.safetensors"), BadSource, "gone.safetensors"),
    ],
)
def test_what_cannot_be_tried_is_refused_and_leaves_no_old_answer(
    project: Path, lora: str, overrides: tuple[str, ...], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        run(lora, overrides=overrides)
    assert not (project / "artifacts/validation/validation.json").exists()


def test_goldens_of_another_base_are_refused_before_anything_is_built(project: Path) -> None:
    shutil.copytree(ROOT / "pocket/model", project / "elsewhere")
    note = project / "elsewhere/scheduler/scheduler_config.json"
    note.write_text(note.read_text() + "\n")
    with pytest.raises(BadGolden, match="approved for the base pocket/model, and the recipe's is elsewhere; give"):
        run(GOOD, overrides=(*ONE_CASE, "base.path=elsewhere"))
    goldens = Goldens(project / "artifacts/golden/pocket")
    goldens.refuse_other_base("pocket/model", {})  # a new version of it
    shutil.copy(ROOT / "pocket/model/scheduler/scheduler_config.json", note)
    goldens.refuse_other_base("elsewhere", lock_base(in_folder(Path("elsewhere")), previous=None).files)  # a mirror
    assert not (project / "artifacts/validation/build").exists()


def given(path: Path) -> LoraInput:
    return LoraInput("lora", path, 1.0)


def test_the_lora_of_a_reordered_base_is_right_there_and_wrong_here(tmp_path: Path) -> None:
    """What makes `other_base` one: every norm is kept, and no direction."""
    other = for_another_base(load_file(ROOT / CURRENT))
    save_file(other, tmp_path / "other.safetensors")
    other_lora = given(tmp_path / "other.safetensors")
    found = compare_files(given(ROOT / CURRENT), other_lora, ROOT / "pocket/model")
    assert found.ratio == pytest.approx(1.0, rel=1e-6)
    assert found.cosine is not None
    assert abs(found.cosine) < 0.01


def test_each_candidate_s_file_has_its_relation_to_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    relations = {row[0]: row[-1] for row in compare(tmp_path)}
    of = {kinship: {name for name, said in relations.items() if said == kinship} for kinship in Kinship}
    assert of[Kinship.SAME] == {"current", "alpha_ignored", "in_8_bits", "noise_0.1", "half", "louder"}
    assert of[Kinship.VERSION] == {"v1", "noise_0.5", "noise_1"}
    assert of[Kinship.OTHER] == {"other_base", "noise_4", "style"}
    assert of[Kinship.OPPOSITE] == {"negated"}
    assert relations["no_effect"] == "-"


@pytest.mark.parametrize("kind", ["plain", "LoHa"])
def test_norms_and_angles_are_those_of_whole_differences(kind: str, tmp_path: Path) -> None:
    """Of plain LoRAs exactly, whatever few rows are read; of others, all rows are asked for here."""
    rng = np.random.default_rng(0)
    names = [f"blocks.{block}.to_q" for block in range(2)]
    save_file({f"{name}.weight": torch.from_numpy(rng.standard_normal((40, 30))) for name in names}, tmp_path / "base")
    whole = []
    for file, rank in (("one", 2), ("other", 5)):
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            a, b, c, d = (rng.standard_normal(shape) for shape in [(40, rank), (rank, 30)] * 2)
            roles = {"lora_up.weight": a, "lora_down.weight": b}
            if kind == "LoHa":
                roles = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
            tensors |= {f"{name}.{role}": torch.from_numpy(values) for role, values in roles.items()}
            whole.append(a @ b * (c @ d if kind == "LoHa" else 1))
        save_file(tensors, tmp_path / file)
    found = compare_files(
        given(tmp_path / "one"), given(tmp_path / "other"), tmp_path / "base", rows=99 if kind == "LoHa" else 3
    )
    one, other = np.concatenate(whole[:2]), np.concatenate(whole[2:])
    norms = np.linalg.norm(one), np.linalg.norm(other)
    assert found.cosine == pytest.approx((one * other).sum() / (norms[0] * norms[1]), rel=1e-9)
    assert found.ratio == pytest.approx(norms[1] / norms[0], rel=1e-9)
    assert found.blocks[0].cosine == pytest.approx(
        (whole[0] * whole[2]).sum() / np.linalg.norm(whole[0]) / np.linalg.norm(whole[2])
    )


def test_a_file_for_several_components_is_compared_in_all_of_them(tmp_path: Path) -> None:
    write_loras("sdxl", tiny("sdxl", tmp_path / "model"), tmp_path / "lora")
    (lora,) = (tmp_path / "lora").iterdir()
    tensors = load_file(lora)
    save_file(
        {
            name: one * (0.5 if name.startswith("lora_te2_") and "lora_up" in name else 1)
            for name, one in tensors.items()
        },
        tmp_path / "new.safetensors",
    )
    found = compare_files(given(lora), given(tmp_path / "new.safetensors"), tmp_path / "model")
    assert (found.only_new, found.only_current) == ((), ())
    assert found.lowest == pytest.approx(0.5, rel=1e-6)
    assert found.highest == pytest.approx(1.0)
    halved = [block.block for block in found.blocks if block.new < 0.75 * block.current]
    assert halved
    assert all(block.startswith("text_encoder_2/") for block in halved)


def test_two_files_are_compared_module_by_module(tmp_path: Path) -> None:
    tensors = load_file(ROOT / CURRENT)
    half = {name: tensor / 2 if "lora_up" in name else tensor for name, tensor in tensors.items()}
    gone = "transformer_blocks.2.attn.to_q"
    save_file(
        {name: one for name, one in half.items() if not name.startswith(f"{gone}.")}, tmp_path / "new.safetensors"
    )
    found = compare_files(given(ROOT / CURRENT), given(tmp_path / "new.safetensors"), ROOT / "pocket/model")
    assert (found.both, found.only_new, found.only_current) == (59, (), (f"{gone}.weight",))
    assert found.ratio == pytest.approx(0.5, rel=1e-6)
    assert found.cosine == pytest.approx(1.0)
    assert [block.block for block in found.blocks] == ["0", "1", "2", "3", "4"]
    assert found.blocks[0].new == pytest.approx(found.blocks[0].current / 2)


def test_effect_and_gain_are_those_of_plain_vectors() -> None:
    plain, current = np.zeros((1, 4), np.float32), np.array([[2, 0, 0, 0]], np.float32)
    assert effect(current, current, plain) == Effect(1.0, 1.0)
    assert effect(np.array([[0, 3, 0, 0]], np.float32), current, plain) == Effect(0.0, 0.0)
    assert effect(-2 * current, current, plain) == Effect(-1.0, -2.0)
    assert effect(current, plain, plain) is None
    assert effect(plain, current, plain) == Effect(0.0, 0.0)
    teacher = np.array([[4, 0, 0, 0]], np.float32)
    assert gain(current, plain, teacher) == pytest.approx(0.5)
    assert gain(-current, plain, teacher) == pytest.approx(-0.5)
    assert math.isnan(gain(current, plain, plain))
    with pytest.raises(ValueError, match="different shapes"):
        effect(plain, current, np.zeros((2, 2), np.float32))


def decided(case: CaseEvidence = CASE, files: FileComparison | None = FILES, asked: float = 1.0) -> Judgement:
    return judge([case], files, [], RECIPE, asked)


def test_a_version_that_nothing_speaks_against_is_changed_or_the_same() -> None:
    assert decided().outcome is Outcome.CHANGED
    assert decided(replace(CASE, changed=1.9e-4)).outcome is Outcome.SAME
    assert decided(replace(CASE, changed=2.1e-4)).outcome is Outcome.CHANGED
    first = replace(CASE, changed=None, effect=None, current_gain=None)
    assert decided(first, None).outcome is Outcome.CHANGED
    assert "no current version" in decided(first, None).reason


@pytest.mark.parametrize(
    ("case", "cause"),
    [
        ({"faults": ("it is flat",)}, Cause.INVALID),
        ({"apart": ("too far",)}, Cause.MERGE),
        ({"moved": 2e-4}, Cause.NO_EFFECT),
        ({"effect": Effect(0.99, 1.9)}, Cause.SCALE),
        ({"effect": Effect(0.99, 0.5)}, Cause.SCALE),
        ({"effect": Effect(0.3, 1.0)}, Cause.OTHER),
        ({"effect": Effect(0.1, 0.1)}, Cause.BASE),
        ({"noise": 1.5}, Cause.NOISE),
        ({"comb_db": 7.0}, Cause.GRID),
        ({"gain": 0.4}, Cause.WORSE),
        ({"gain": math.nan}, Cause.WORSE),
    ],
)
def test_each_fault_has_its_cause(case: dict[str, object], cause: Cause) -> None:
    found = decided(replace(CASE, **case))  # type: ignore[arg-type]
    assert (found.outcome, found.cause) == (Outcome.BROKEN, cause)
    assert found.reason


def test_the_same_differences_at_another_size_are_a_wrong_scale_unless_it_was_asked_for() -> None:
    double = replace(FILES, ratio=2.0, cosine=0.999)
    assert decided(files=double).cause is Cause.SCALE
    assert decided(files=replace(double, ratio=1.0, cosine=-0.999)).cause is Cause.SCALE
    assert decided(files=replace(double, cosine=0.7)).outcome is Outcome.CHANGED  # another training may be larger
    assert decided(files=double, asked=0.5).outcome is Outcome.CHANGED  # made up for
    louder = replace(CASE, effect=Effect(0.99, 2.0))
    assert decided(louder, replace(FILES, ratio=1.0, cosine=1.0), asked=2.0).outcome is Outcome.CHANGED  # meant


def test_a_known_wrong_pair_is_a_wrong_base() -> None:
    found = judge([CASE], FILES, ["x was made for y"], RECIPE)
    assert (found.cause, found.reason) == (Cause.BASE, "x was made for y")


def test_a_pair_that_the_recipe_makes_on_purpose_is_not_held_against_its_next_version() -> None:
    def lock(repo_id: str, file: str = "model_index.json") -> Lock:
        return Lock(repo_id, None, "main", "c" * 40, {file: FileRecord(1, "d" * 64)})

    lightning = "lightx2v/Qwen-Image-Lightning"
    edit, of_2509 = "Qwen-Image-Edit-Lightning-4steps-V1.0.safetensors", "Qwen-Image-Edit-2509/a-V1.0.safetensors"
    base = lock("Qwen/Qwen-Image-Edit")
    right, wrong = (Version({"l": lock(lightning, file)}, {"l": 1.0}) for file in (edit, of_2509))
    assert "made for Qwen/Qwen-Image-Edit-2509" in misfits(base, wrong, right, "l")[0]
    assert misfits(base, wrong, None, "l")
    assert misfits(base, right, wrong, "l") == []
    assert misfits(base, wrong, wrong, "l") == []


def test_a_case_in_which_the_current_version_does_not_save_steps_asks_for_nothing() -> None:
    weak = replace(CASE, name="photo", gain=-1.0, current_gain=0.1)
    assert judge([CASE, weak], FILES, [], RECIPE).outcome is Outcome.CHANGED
    assert judge([replace(CASE, gain=0.1, current_gain=None, effect=None)], None, [], RECIPE).cause is Cause.WORSE


def test_a_drawn_grid_is_seen_and_the_picture_alone_is_not() -> None:
    from lora_fuse.pictures.damage import comb_db

    picture = np.random.default_rng(0).integers(60, 180, (128, 128, 3)).astype(np.uint8)
    assert comb_db(grid(picture, 8), picture) > RECIPE.validation.comb_db


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("me/loras@v2:a/b.safetensors", ("me/loras", None, "v2", "a/b.safetensors")),
        ("me/loras:b.safetensors", ("me/loras", None, "main", "b.safetensors")),
        ("me/loras@refs/pr/3:.", ("me/loras", None, "refs/pr/3", ".")),
        (GOOD, (None, "pocket/lora", None, "pocket-lightning-4steps-v1.safetensors")),
        ("pocket/lora", (None, "pocket/lora", None, ".")),
    ],
)
def test_a_lora_is_named_by_repository_or_path(
    text: str, wanted: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert tuple(parse_lora(text)[key] for key in ("repo_id", "path", "revision", "filename")) == wanted


def test_the_candidate_is_the_recipe_with_one_lora_and_one_scale_changed() -> None:
    params = recipe_of("recipe=pocket_pastel")
    new = candidate(params, GOOD, "lightning", 0.5)
    assert new.loras["lightning"].filename == Path(GOOD).name
    assert new.loras["pastel"] == params.loras["pastel"]
    assert new.fuse.scale == 0.5
