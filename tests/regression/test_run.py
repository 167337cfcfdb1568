"""Laws of the regression run: real pocket pipelines, text to image because that is fastest."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from lora_fuse.checkpoint.diffusers_layout import diffusers_files
from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.errors import BadCheckpoint, RenderFailed
from lora_fuse.fusion.merge import write_merged
from lora_fuse.fusion.plan import Plan, make_plan
from lora_fuse.lora.inputs import LoraInput, Selection
from lora_fuse.machine.files import hash_file
from lora_fuse.pictures.cases import Case, Sampling
from lora_fuse.pictures.environment import environment
from lora_fuse.pictures.metrics import METRICS, latents_l2
from lora_fuse.pictures.pairs import BaseSides, Pair, Setup, check_cases, render_all, render_pairs, share
from lora_fuse.pictures.picture import levels_of
from lora_fuse.pictures.render import load_pipeline, make_scheduler, render
from lora_fuse.pictures.render_progress import RenderProgress
from lora_fuse.pictures.unfused_lora import DIFFUSERS, _beyond_diffusers, attach, attach_differences
from lora_fuse.pictures.weights_in_place import jitter, take_weights
from lora_fuse.recipe.records import Lock, Manifest, MergedLora, from_json, to_json
from lora_fuse.regression.candidates import Candidates, candidates, save_pictures
from lora_fuse.regression.case_judgement import judge_pairs
from lora_fuse.regression.run_record import RunRecord
from lora_fuse.regression.verdicts import Golden, Limits, Rules, Verdict
from tests.support.composed import tree_of

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "pocket/model"
LORA = ROOT / "pocket/lora/pocket-lightning-4steps-v2.safetensors"
CASES = [Case("one", "a purple rabbit", 0, height=128, width=128), Case("two", "a blue bear", 1, height=128, width=96)]
Array = npt.NDArray[Any]
RULES = Rules(  # conf/regress/_pocket.yaml
    Limits({"psnr_db": 60, "max_abs": 4}), Limits({"psnr_db": 54, "max_abs": 6}), 2.0, (1.0, 0.9, 0.75, 0.5)
)


def plan(scale: float, lora: Path = LORA, selection: Selection | None = None) -> Plan:
    return make_plan(open_checkpoint(BASE), [LoraInput("l", lora, scale)], selection)


def stored(folder: Path) -> dict[str, Array]:
    """Every tensor of a component, in float32."""
    found = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    return {name: tensor.astype(np.float32) for name, tensor in found.items()}


def merge(out: Path, what: Plan, scheduler: Mapping[str, object]) -> Path:
    generated = diffusers_files(BASE, pipeline="QwenImagePipeline", scheduler=dict(scheduler))
    write_merged(what, out, device="cpu", generated=generated, known={}, progress=lambda _: None)
    return out


@pytest.fixture(scope="module")
def setup() -> Setup:
    scheduler = tree_of()["scheduler"]
    return Setup("QwenImagePipeline", Sampling(4, 1.0, " "), scheduler, "cpu", "float32")


@pytest.fixture(scope="module")
def progress() -> RenderProgress:
    return RenderProgress()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, setup: Setup, progress: RenderProgress) -> list[Pair]:
    merged = merge(tmp_path_factory.mktemp("merge") / "merged", plan(1.0), setup.scheduler)
    with_baseline = replace(setup, baseline=Sampling(6, 4.0, " "))
    said: list[str] = []
    progress.say = lambda sentence, _: said.append(sentence)
    weights = stored(merged / "transformer")
    short = dict(list(weights.items())[1:])
    exports = {"same": lambda: iter(weights.items()), "short": lambda: iter(short.items())}
    rendered = render_pairs(merged, plan(1.0), CASES, with_baseline, progress, exports=exports)
    loaded = [sentence.removeprefix("loading ") for sentence in said if sentence.startswith("loading ")]
    sides = ["merged transformer", "export same", "export short", "base transformer"]
    assert loaded == ["libraries", "text encoder", "VAE", *sides]
    return rendered


def test_an_export_with_the_merged_weights_makes_the_merged_picture_and_one_that_lacks_any_makes_none(
    pairs: list[Pair],
) -> None:
    for pair, judged in zip(pairs, judge_pairs(pairs, {}, RULES), strict=True):
        assert list(pair.exports) == ["same"]
        assert (pair.exports["same"].latents == pair.merged.latents).all()
        compared = judged.exports["same"]
        assert compared is not None
        assert compared.identical
        assert compared.values["latents_l2"] == 0


def test_an_export_s_weights_are_the_model_s_and_no_others() -> None:
    model = torch.nn.Linear(2, 3)
    right = {"weight": np.ones((3, 2), np.float32), "bias": np.ones(3, np.float32)}
    wrong: dict[str, list[tuple[str, Array]]] = {
        "lacks 'bias'": [("weight", right["weight"])],
        "'scale', which is no weight": [*right.items(), ("scale", right["bias"])],
        "'bias', which comes twice": [*right.items(), ("bias", right["bias"])],
        r"of shape \(2,\), the model of \(3,\)": [("bias", np.ones(2, np.float32))],
    }
    for said, weights in wrong.items():
        with pytest.raises(BadCheckpoint, match=said):
            take_weights(model, weights, "x")
    take_weights(model, right.items(), "x")
    assert all((parameter == 1).all() for parameter in model.parameters())


def test_merged_and_unfused_agree_and_visit_the_recipe_s_sigmas(pairs: list[Pair]) -> None:
    assert [case.result.verdict for case in judge_pairs(pairs, {}, RULES)] == [Verdict.NO_GOLDEN] * 2
    assert pairs[0].merged.sigmas == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))
    assert [pair.merged.size for pair in pairs] == [(128, 128), (96, 128)]


def test_the_base_alone_runs_at_its_own_steps_and_scheduler_without_the_lora(pairs: list[Pair]) -> None:
    alone = pairs[0].baseline
    assert alone is not None
    assert len(alone.sigmas) == 7
    assert alone.sigmas[-2] == pytest.approx(0.02)  # the base's shift_terminal
    assert np.abs(alone.levels.astype(int) - pairs[0].merged.levels).max() > 30


def test_everything_is_loaded_once_and_its_seconds_are_kept(pairs: list[Pair], progress: RenderProgress) -> None:
    assert len(pairs) == 2
    sides = ["merged transformer", "beside the pictures", "export same", "base transformer"]
    before = ["libraries", "text encoder", "prompts", "memory given back", "VAE"]
    assert list(progress.seconds) == [*before, *sides, "LoRAs beside it", "noise floor"]
    assert all(seconds > 0 for seconds in progress.seconds.values())


@pytest.mark.parametrize("ours", [False, True])
def test_loras_come_and_go_beside_a_base_that_is_loaded_once(
    setup: Setup, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = plan(1.0, selection=Selection(skip=("*.img_mlp.*",)) if ours else None)
    shared = share(BASE, CASES[:1], setup)
    sides = BaseSides(BASE, CASES[:1], setup, shared)
    (plain,) = sides.beside(None, "without")
    (beside,) = sides.beside(chosen, "beside")
    monkeypatch.setattr("lora_fuse.pictures.load_plan.load_pipeline", None)
    assert (sides.beside(None, "again")[0].latents == plain.latents).all()
    assert (sides.beside(chosen, "again")[0].latents == beside.latents).all()
    assert latents_l2(beside.latents, plain.latents) > 1e-2


def test_the_floor_is_of_the_size_that_rounding_the_merge_leaves_and_no_picture_shows_it(pairs: list[Pair]) -> None:
    for pair, judged in zip(pairs, judge_pairs(pairs, {}, RULES), strict=True):
        floor, over = judged.result.floor, judged.result.over_floor
        assert floor is not None
        assert over is not None
        assert 0.3 < over < 1.7
        assert 1e-5 < floor.values["latents_l2"] < 1e-2
        assert floor.values["max_abs"] <= 2
        assert floor.values["latents_l2"] == latents_l2(pair.floor.latents, pair.unfused.latents)


def test_every_metric_is_measured_between_merged_and_unfused(pairs: list[Pair]) -> None:
    (judged, _) = judge_pairs(pairs, {}, RULES)
    assert judged.result.vs_unfused is not None
    assert judged.result.vs_unfused.values.keys() == METRICS.keys()


def test_every_picture_has_its_cost(pairs: list[Pair]) -> None:
    for pair in pairs:
        for rendered in (pair.merged, pair.unfused, pair.floor):
            assert rendered.cost.seconds > 0
            assert rendered.cost.steps_per_s is not None
            assert rendered.cost.steps_per_s > 3 / rendered.cost.seconds
            assert rendered.cost.peak_host_bytes > 50_000_000


def test_a_run_is_exact_against_its_own_pictures(pairs: list[Pair], tmp_path: Path) -> None:
    images = tmp_path / "images"
    save_pictures(judge_pairs(pairs, {}, RULES), images)
    assert sorted(path.name for path in images.iterdir()) == sorted(
        f"{pair.case.name}.{side}.png" for pair in pairs for side in ("merged", "unfused", "baseline", "same")
    )
    goldens = {}
    for pair in pairs:
        with Image.open(images / f"{pair.case.name}.merged.png") as picture:
            goldens[pair.case.name] = [Golden(levels_of(picture), name="a.png")]
    assert [case.result.verdict for case in judge_pairs(pairs, goldens, RULES)] == [Verdict.EXACT] * 2


def test_what_a_run_leaves_for_approval_names_all_that_its_pictures_came_from(
    pairs: list[Pair], setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = Recipe(Lock(None, "pocket/model", None, None, {}), (MergedLora("l", 1.0, "a" * 64),))
    judged = judge_pairs(pairs, {}, RULES)
    found = candidates(judged, recipe.manifest, "m" * 64, setup)
    assert from_json(Candidates, to_json(found), "") == found
    save_pictures(judged, tmp_path / "images")
    for pair in pairs:
        candidate = found.cases[pair.case.name]
        assert candidate.sha256 == hash_file(tmp_path / f"images/{pair.case.name}.merged.png").sha256
        provenance = candidate.provenance
        assert (candidate.agrees, provenance.sigmas, provenance.steps) == (True, pair.merged.sigmas, 4)
        assert (provenance.base, provenance.loras) == ("pocket/model", recipe.loras)
        assert provenance.scheduler == dict(setup.scheduler)
        assert (provenance.case.prompt, provenance.case.seed) == (pair.case.prompt, pair.case.seed)
    run = RunRecord.of(to_json(found), environment("cpu", "float32"), pairs, {"VAE": 0.5})
    assert from_json(RunRecord, to_json(run), "") == run
    assert (run.is_of(to_json(found)), run.is_of(to_json(found) + " ")) == (True, False)
    assert (run.environment.key, list(run.costs)) == (environment("cpu", "float32").key, list(found.cases))
    assert run.tool.git is not None
    assert run.seconds["loads"] == {"VAE": 0.5}
    assert run.seconds["floor"] == {pair.case.name: pair.floor.cost.seconds for pair in pairs}
    assert list(run.seconds) == ["loads", "merged", "unfused", "floor", "baseline", "export same"]


@dataclass(frozen=True)
class Recipe:
    """A manifest of a base and its LoRAs."""

    base: Lock
    loras: tuple[MergedLora, ...]

    @property
    def manifest(self) -> Manifest:
        return Manifest(1, "pocket", self.base, self.loras, 1.0, 60, {})


@pytest.mark.parametrize(("scale", "own_scheduler"), [(0.9, False), (0.0, False), (2.0, False), (1.0, True)])
def test_a_merge_at_another_scale_or_with_the_base_s_scheduler_is_a_regression(
    tmp_path: Path, setup: Setup, scale: float, own_scheduler: bool
) -> None:
    merged = merge(tmp_path / "merged", plan(scale), {} if own_scheduler else setup.scheduler)
    wrong = render_pairs(merged, plan(1.0), CASES[:1], setup)
    (judged,) = judge_pairs(wrong, {}, RULES)
    assert (judged.result.verdict, judged.result.agrees) == (Verdict.REGRESSION, False)
    said = [
        word for reason in judged.result.reasons for word in ("sigmas", "unfused picture", "floor") if word in reason
    ]
    assert set(said) == {"unfused picture", "floor", *(("sigmas",) if own_scheduler else ())}


def test_another_floor_is_no_way_around_a_wrong_merge(tmp_path: Path, setup: Setup) -> None:
    """A scale that the picture's limits would let through: the latents tell."""
    merged = merge(tmp_path / "merged", plan(0.99), setup.scheduler)
    pairs = render_pairs(merged, plan(1.0), CASES[:1], setup)
    loose = Limits({"psnr_db": 20})
    (judged,) = judge_pairs(pairs, {}, replace(RULES, unfused=loose))
    assert judged.result.verdict is Verdict.REGRESSION
    assert "times the noise floor" in judged.result.reasons[0]
    (judged,) = judge_pairs(pairs, {}, replace(RULES, unfused=loose, over_floor=None))
    assert judged.result.verdict is Verdict.NO_GOLDEN


def test_other_steps_than_the_recipe_s_sigmas_are_a_regression(pairs: list[Pair]) -> None:
    (judged, _) = judge_pairs(pairs, {}, replace(RULES, sigmas=(1.0, 0.5)))
    assert judged.result.verdict is Verdict.REGRESSION
    assert "visited the sigmas 1, 0.9, 0.75, 0.5, the recipe's are 1, 0.5." in judged.result.reasons[0]


@pytest.mark.parametrize(("images", "said"), [((), "takes 1"), ((Path("nowhere.png"),), "cannot be read")])
def test_cases_are_looked_at_before_anything_is_loaded(setup: Setup, images: tuple[Path, ...], said: str) -> None:
    edit = replace(setup, pipeline="QwenImageEditPipeline")
    with pytest.raises(RenderFailed, match=said):
        check_cases([replace(CASES[0], images=images)], edit)


def other_lora(path: Path, kind: str) -> Path:
    """A LoRA of a kind that diffusers does not read, for some modules of pocket's transformer."""
    rng, weights = np.random.default_rng(5), load_file(next((BASE / "transformer").glob("*00001*.safetensors")))

    def random(*shape: int) -> Array:
        return (rng.standard_normal(shape) / 4).astype(np.float32)

    state: dict[str, Array] = {}
    for name in ("attn.to_q", "attn.to_out.0", "img_mlp.net.2"):
        module = f"transformer_blocks.0.{name}"
        weight = weights[f"{module}.weight"].astype(np.float32)
        rows, columns = weight.shape
        parts: dict[str, Array]
        match kind:
            case "LoHa":
                shapes = {"w1_a": (rows, 4), "w1_b": (4, columns), "w2_a": (rows, 4), "w2_b": (4, columns)}
                parts = {f"hada_{end}": random(*shape) for end, shape in shapes.items()}
            case "LoKr":
                shapes = {"w1": (4, 4), "w2_a": (rows // 4, 2), "w2_b": (2, columns // 4)}
                parts = {f"lokr_{end}": random(*shape) for end, shape in shapes.items()}
            case "diff":
                parts = {"diff": random(rows, columns) / 8, "diff_b": random(rows) / 4}
            case _:
                lengths = np.linalg.norm(weight, axis=1)[:, None]
                parts = {"lora_down.weight": random(4, columns), "lora_up.weight": random(rows, 4) / 8}
                parts["dora_scale"] = (lengths * 1.1).astype(np.float32)
        state |= {f"{module}.{end}": tensor for end, tensor in parts.items()}
    if kind == "diff":
        state["transformer_blocks.0.attn.norm_q.diff"] = random(
            *weights["transformer_blocks.0.attn.norm_q.weight"].shape
        )
    save_file(state, path)
    return path


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "diff", "DoRA"])
def test_what_diffusers_cannot_read_is_put_beside_the_base_here(tmp_path: Path, setup: Setup, kind: str) -> None:
    lora = other_lora(tmp_path / "other.safetensors", kind)
    merged, wrong = (merge(tmp_path / f"{scale}", plan(scale, lora), setup.scheduler) for scale in (1.0, 0.7))
    (pair,) = render_pairs(merged, plan(1.0, lora), CASES[:1], setup)
    assert "diffusers does not read" in pair.unfused_by
    assert judge_pairs([pair], {}, RULES)[0].result.verdict is Verdict.NO_GOLDEN
    regressed = judge_pairs(render_pairs(wrong, plan(1.0, lora), CASES[:1], setup), {}, RULES)
    assert regressed[0].result.verdict is Verdict.REGRESSION


def test_modules_that_are_left_out_or_scaled_are_so_beside_the_base_too(tmp_path: Path, setup: Setup) -> None:
    selection = Selection(skip=("*.img_mlp.*",), scales={"*.attn.*": 0.5})
    chosen = plan(1.0, selection=selection)
    (pair,) = render_pairs(merge(tmp_path / "merged", chosen, setup.scheduler), chosen, CASES[:1], setup)
    assert "leaves modules out" in pair.unfused_by
    assert judge_pairs([pair], {}, RULES)[0].result.verdict is Verdict.NO_GOLDEN
    (other,) = render_pairs(tmp_path / "merged", plan(1.0), CASES[:1], setup)
    assert judge_pairs([other], {}, RULES)[0].result.verdict is Verdict.REGRESSION


def test_the_differences_here_draw_what_diffusers_draws(pairs: list[Pair], setup: Setup) -> None:
    """The two ways to put a LoRA beside a base, against each other."""
    pipe = load_pipeline(BASE, setup.pipeline, dtype="float32")
    pipe.register_modules(scheduler=make_scheduler(setup.scheduler))
    attach_differences(pipe.transformer, plan(1.0).targets)
    ours = render(pipe, CASES[0], setup.sampling).levels.astype(int)
    assert np.abs(ours - pairs[0].unfused.levels).max() <= 1
    assert pairs[0].unfused_by == DIFFUSERS


@pytest.mark.parametrize("place", ["header alpha", "header lora_config", "adapter_config.json"])
def test_a_strength_that_diffusers_does_not_read_is_attached_here(tmp_path: Path, setup: Setup, place: str) -> None:
    state = load_file(LORA)
    state = {
        key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): state[key] for key in state if "lora_" in key
    }
    config = json.dumps({"r": 8, "lora_alpha": 4})
    headers = {"header alpha": {"alpha": "4"}, "header lora_config": {"lora_config": config}}
    save_file(state, tmp_path / "l.safetensors", metadata=headers.get(place))
    if place == "adapter_config.json":
        (tmp_path / place).write_text(config)
    pipe = load_pipeline(BASE, setup.pipeline, dtype="float32")
    attached = attach(pipe, plan(1.0, tmp_path / "l.safetensors"))
    assert attached.by == f"lora-fuse, for diffusers does not read the strength in {place}"


@pytest.mark.parametrize(
    ("fields", "ours"),
    [
        ({"target_modules": ["to_q"], "rank_pattern": {"blocks.0.attn.to_q": 8}}, False),
        ({"target_modules": "(.|.|.|.)+$o"}, True),
        ({"layers_pattern": ["(.|.|.|.)+$o"]}, True),
        ({"alpha_pattern": {"x(.|.|.|.)+$o": 4}}, True),
    ],
)
def test_patterns_that_may_never_end_are_not_given_to_diffusers(
    tmp_path: Path, fields: dict[str, object], ours: bool
) -> None:
    state = load_file(LORA)
    state = {
        key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): state[key] for key in state if "lora_" in key
    }
    config = {f"transformer.{key}": value for key, value in {"r": 8, "lora_alpha": 8, **fields}.items()}
    save_file(state, tmp_path / "l.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    expected = "diffusers would match the patterns in header lora_adapter_metadata (transformer) without an end"
    assert _beyond_diffusers(plan(1.0, tmp_path / "l.safetensors")) == (expected if ours else None)


@pytest.mark.parametrize("ours", [False, True])
def test_the_floor_moves_the_base_s_weights_with_the_lora_beside_them(setup: Setup, ours: bool) -> None:
    chosen = plan(1.0, selection=Selection(skip=("*.img_mlp.*",)) if ours else None)
    pipe = load_pipeline(BASE, setup.pipeline, dtype="float32")
    pipe.register_modules(scheduler=make_scheduler(setup.scheduler))
    attach(pipe, chosen)
    before = render_all(pipe, CASES[:1], setup.sampling, "cpu")[0]
    jitter(pipe.transformer, chosen.targets, [torch.float16])
    after = render_all(pipe, CASES[:1], setup.sampling, "cpu")[0]
    assert 1e-6 < latents_l2(after.latents, before.latents) < 1e-2
