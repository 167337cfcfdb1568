"""Laws of builds of several components: each has the bytes that a merge of it alone gives, and one proof is of all."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_fuse
from lora_fuse import LoraInput, cli
from lora_fuse.errors import BadCheckpoint, BadConfig, BadLora, Refused
from lora_fuse.fusion import cautions
from lora_fuse.fusion.manifest import manifest_path, read_manifest
from lora_fuse.lora.inputs import Selection
from lora_fuse.recipe import Artifacts, paths
from lora_fuse.regression.review import block_changes
from lora_fuse.release.card import build_options
from stages.config import load
from stages.download import download
from stages.fuse import fuse
from stages.verify import verify
from tests.support import tiny

TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def write(folder: Path, main: str = "transformer", more: Mapping[str, dict[str, tiny.Array]] | None = None) -> Path:
    """A pipeline with these components beside the usual ones, all of them in its index."""
    tiny.write_pipeline(folder, tiny.weights())
    (folder / "transformer").rename(folder / main)
    index = json.loads((folder / "model_index.json").read_text())
    del index["transformer"]
    index |= {name: ["diffusers", "Tiny"] for name in (main, *(more or {}))}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, tensors in (more or {}).items():
        tiny.write_component(folder / name, tensors, shards=1)
    return folder


def encoder(seed: int) -> dict[str, tiny.Array]:
    return {f"{TEXT}.weight": np.random.default_rng(seed).standard_normal((16, 16)).astype(tiny.BF16)}


def kohya(prefix: str, module: str, shape: tuple[int, int], seed: int) -> dict[str, tiny.Array]:
    rng = np.random.default_rng(seed)
    name = prefix + module.replace(".", "_")
    return {
        f"{name}.lora_down.weight": rng.standard_normal((4, shape[1])).astype(np.float32),
        f"{name}.lora_up.weight": rng.standard_normal((shape[0], 4)).astype(np.float32),
        f"{name}.alpha": np.array(2.0, np.float32),
    }


class Experts:
    """A pipeline with a transformer for high and one for low noise, and a LoRA for each."""

    def __init__(self, folder: Path) -> None:
        self.base = write(folder / "base", more={"transformer_2": tiny.weights(seed=1)})
        self.high = tiny.write_lora(folder / "wan_high_noise.safetensors", tiny.lora_tensors(seed=2))
        self.low = tiny.write_lora(folder / "wan_low_noise.safetensors", tiny.lora_tensors(seed=3))
        self.out = folder / "out"
        self.given: list[str] = []
        for lora, component in ((self.high, "transformer"), (self.low, "transformer_2")):
            self.given += ["--lora", str(lora), "--component", component]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Experts:
    made = Experts(tmp_path_factory.mktemp("experts"))
    assert cli.main(["fuse", str(made.base), str(made.out), *made.given, "--device", "cpu"]) == 0
    return made


def hashes(folder: Path, out: Path) -> dict[str, str]:
    manifest, _ = read_manifest(manifest_path(out))
    return {name: file.sha256 for name, file in manifest.files.items() if name.startswith(f"{folder}/")}


def test_each_component_has_the_bytes_of_a_merge_of_it_alone(experts: Experts, tmp_path: Path) -> None:
    for component, lora in (("transformer", experts.high), ("transformer_2", experts.low)):
        alone = tmp_path / component
        plan = lora_fuse.plan(experts.base, [LoraInput("l", lora, 1.0, component)])
        with pytest.warns(UserWarning, match="nothing is fused into transformer"):
            lora_fuse.fuse(plan, alone, device="cpu")
        assert hashes(Path(component), alone) == hashes(Path(component), experts.out)
        assert not plan.further


def test_one_manifest_and_one_verification_know_all_components(
    experts: Experts, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, _ = read_manifest(manifest_path(experts.out))
    assert manifest.components == {"transformer": 6, "transformer_2": 6}
    assert [lora.components for lora in manifest.loras] == [("transformer",), ("transformer_2",)]
    assert manifest.targets == 12
    arguments = ["verify", str(experts.out), str(experts.base)]
    assert cli.main([*arguments, *experts.given]) == 0
    assert "12 targets (12 modules)" in capsys.readouterr().out
    swapped = [*experts.given]
    swapped[1], swapped[5] = swapped[5], swapped[1]
    assert cli.main([*arguments, *swapped]) == 1
    assert "transformer_2/transformer_blocks.0" in capsys.readouterr().err
    assert cli.main([*arguments, "--lora", str(experts.high)]) == 1
    assert "transformer_2/diffusion_pytorch_model" in capsys.readouterr().err


def test_a_changed_byte_of_either_component_is_found(experts: Experts, tmp_path: Path) -> None:
    loras = [LoraInput("h", experts.high, 1.0), LoraInput("l", experts.low, 1.0, "transformer_2")]
    lora_fuse.fuse(lora_fuse.plan(experts.base, loras), tmp_path / "out", device="cpu", untouched="copy")
    assert lora_fuse.verify(tmp_path / "out", experts.base, loras, rows="all").passed
    for path in sorted((tmp_path / "out").rglob("*.safetensors")):
        sound = path.read_bytes()
        path.write_bytes(sound[:-3] + bytes([sound[-3] ^ 64]) + sound[-2:])
        assert not lora_fuse.verify(tmp_path / "out", experts.base, loras, rows="all").passed, path
        path.write_bytes(sound)


def test_stages_build_what_the_recipe_says_of_components(
    experts: Experts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "SEEN", tmp_path / "seen.json")
    loras = [
        f"+loras.{name}={{repo_id:null,path:'{path.parent}',revision:null,filename:{path.name},component:{component}}}"
        for name, path, component in (("h", experts.high, "transformer"), ("l", experts.low, "transformer_2"))
    ]
    overrides = [f"base.path='{experts.base}'", "~loras.lightning", *loras]
    recipe = load(overrides)
    at = Artifacts(tmp_path / "artifacts")
    assert (download(recipe, at), fuse(recipe, at), verify(recipe, at)) == (0, 0, 0)
    assert {name: lock.component for name, lock in at.read_locks()[1].items()} == {
        "h": "transformer",
        "l": "transformer_2",
    }
    for component in ("transformer", "transformer_2"):
        assert hashes(Path(component), at.merged) == hashes(Path(component), experts.out)
    checked = json.loads(at.verify.read_text())
    assert (checked["passed"], checked["targets"]) == (True, 12)
    assert {block.block for block in block_changes(checked["changes"])} == {
        f"{component}/{block}" for component in ("transformer", "transformer_2") for block in range(tiny.BLOCKS)
    }
    swapped = load([*overrides, "loras.h.component=transformer_2"])
    assert verify(swapped, at) == 0
    assert not json.loads(at.verify.read_text())["passed"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lora", "F", "--component", "a", "--component", "b"], "--component is given twice for --lora F, a and b"),
        (["--component", "a", "--component", "b", "--lora", "F"], "--component is given twice for all, a and b"),
        (["--lora", "F", "--lora", "G", "--component", "a"], "2 --lora and 1 --component"),
        (["--component", "a", "--lora", "F", "--component", "b"], "1 --lora and 2 --component"),
    ],
)
def test_a_component_goes_with_the_lora_before_it(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "BASE", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("wan_high_noise", "wan_low_noise"), []),
        (("wan_low_noise", "wan_high_noise"), ["wan_low_noise.safetensors is for low noise by its name", "for high"]),
        (("Wan22-HIGH-bf16", "Wan22-LOW-bf16"), []),
        (("Wan22-LOW-bf16", "flowers-lowlight"), ["Wan22-LOW-bf16.safetensors is for low noise"]),
        (("high_and_low_noise", "style"), []),
        (("style", None), ["nothing is fused into transformer_2"]),
    ],
)
def test_a_lora_for_the_other_expert_is_warned_of_by_its_name(
    experts: Experts, tmp_path: Path, names: tuple[str, str | None], said: list[str]
) -> None:
    loras = []
    for name, component in zip(names, ("transformer", "transformer_2"), strict=True):
        if name is not None:
            path = tmp_path / f"{name}.safetensors"
            path.write_bytes(experts.high.read_bytes())
            loras.append(LoraInput(name, path, 1.0, component))
    found = [one for one in cautions(lora_fuse.plan(experts.base, loras), {"shift": 1.0}) if "alpha" not in one]
    assert len(found) == len(said), found
    assert all(words in sentence for words, sentence in zip(said, found, strict=True))


def test_the_card_builds_it_again_and_report_and_card_say_where_each_lora_is(experts: Experts) -> None:
    manifest, _ = read_manifest(manifest_path(experts.out))
    assert [option.partition(" --scale")[2] for option in build_options(manifest)] == [
        " 1.0 --component transformer",
        " 1.0 --component transformer_2",
    ]


def test_one_component_before_the_first_lora_is_for_all(experts: Experts, capsys: pytest.CaptureFixture[str]) -> None:
    loras = ["--lora", str(experts.high), "--lora", str(experts.low)]
    assert cli.main(["plan", str(experts.base), "--component", "transformer_2", *loras]) == 0
    assert capsys.readouterr().out.count("into transformer_2\n") == 2


class Encoders:
    """A pipeline with a UNet and two text encoders, and one LoRA for all, in kohya's names."""

    def __init__(self, folder: Path) -> None:
        self.base = write(folder / "base", "unet", {"text_encoder": encoder(4), "text_encoder_2": encoder(5)})
        tensors = tiny.lora_tensors()
        tensors |= kohya("lora_te1_", TEXT, (16, 16), 6) | kohya("lora_te2_", TEXT, (16, 16), 7)
        self.lora = LoraInput("l", tiny.write_lora(folder / "l.safetensors", tensors), 0.5)
        self.tensors = tensors


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    return Encoders(tmp_path_factory.mktemp("encoders"))


def test_keys_say_which_component_they_are_for(encoders: Encoders, tmp_path: Path) -> None:
    plan = lora_fuse.plan(encoders.base, [encoders.lora])
    assert [part.component for part in plan.parts] == ["unet", "text_encoder", "text_encoder_2"]
    lora_fuse.fuse(plan, tmp_path / "out", device="cpu")
    found = lora_fuse.verify(tmp_path / "out", encoders.base, [encoders.lora], rows="all")
    assert (found.passed, found.problems) == (True, [])
    assert f"text_encoder_2/{TEXT}.weight" in found.changes
    for folder, prefix in (("text_encoder", "lora_te1_"), ("text_encoder_2", "lora_te2_")):
        name = prefix + TEXT.replace(".", "_")
        up, down = (encoders.tensors[f"{name}.lora_{side}.weight"].astype(np.float64) for side in ("up", "down"))
        file = f"{folder}/diffusion_pytorch_model.safetensors"
        before, after = (load_file(root / file)[f"{TEXT}.weight"] for root in (encoders.base, tmp_path / "out"))
        wanted = (before.astype(np.float64) + 0.5 * 2.0 / 4 * up @ down).astype(tiny.BF16)
        assert after.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("there", ["", "text_model."])
@pytest.mark.parametrize(
    "key", ["lora_te1_text_model_{}", "lora_te1_{}", "text_encoder.text_model.{}", "text_encoder.{}"]
)
def test_clip_s_names_with_and_without_their_beginning_are_one(there: str, key: str, tmp_path: Path) -> None:
    module = TEXT.removeprefix("text_model.")
    weight = next(iter(encoder(4).values()))
    base = write(tmp_path / "base", "unet", {"text_encoder": {f"{there}{module}.weight": weight}})
    name = key.format(module if "." in key else module.replace(".", "_"))
    factors = kohya("", "x", (16, 16), 6)
    lora = tiny.write_lora(tmp_path / "l.safetensors", {k.replace("x", name, 1): v for k, v in factors.items()})
    loras = [LoraInput("l", lora, 1.0)]
    lora_fuse.fuse(lora_fuse.plan(base, loras), tmp_path / "out", device="cpu")
    found = lora_fuse.verify(tmp_path / "out", base, loras)
    assert (found.passed, list(found.changes)) == (True, [f"{there}{module}.weight"])


def test_other_components_may_be_left_out_on_purpose_only(encoders: Encoders) -> None:
    named = LoraInput("l", encoders.lora.path, 1.0, "unet")
    with pytest.raises(BadLora, match=r"2 of 8 modules are for text_encoder, text_encoder_2 .*into unet"):
        lora_fuse.plan(encoders.base, [named])
    plan = lora_fuse.plan(encoders.base, [named], selection=Selection(leave_out=("lora_te*",)))
    assert [part.component for part in plan.parts] == ["unet"]
    assert len(plan.loras[0].left_out) == 6


def test_a_component_that_the_base_has_not_is_refused(encoders: Encoders, experts: Experts, tmp_path: Path) -> None:
    with pytest.raises(BadLora, match="for text_encoder, text_encoder_2"):
        lora_fuse.plan(experts.base, [encoders.lora])
    with pytest.raises(BadLora, match="BASE, which is no pipeline"):
        lora_fuse.plan(encoders.base / "unet", [encoders.lora])
    with pytest.raises(BadCheckpoint, match=r"no component transformer_3.*--component"):
        lora_fuse.plan(experts.base, [LoraInput("l", experts.high, 1.0, "transformer_3")])
    two = [LoraInput("h", experts.high, 1.0, "transformer"), LoraInput("l", experts.low, 1.0, "transformer_2")]
    with pytest.raises(BadConfig, match=r"one component.*transformer and transformer_2"):
        lora_fuse.plan(experts.base / "transformer", two)
    lost = write(tmp_path / "lost", "prior")
    with pytest.raises(BadCheckpoint, match=r"no component transformer.*weights in prior.*--component prior"):
        lora_fuse.plan(lost, [LoraInput("l", experts.high, 1.0)])


def test_a_dtype_is_that_of_all_components(experts: Experts, tmp_path: Path) -> None:
    loras = [LoraInput("h", experts.high, 1.0), LoraInput("l", experts.low, 1.0, "transformer_2")]
    fused = lora_fuse.fuse(lora_fuse.plan(experts.base, loras, dtype="float32"), tmp_path / "out", device="cpu")
    assert fused.manifest.dtype == "F32"
    found = lora_fuse.verify(tmp_path / "out", experts.base, loras, dtype="float32")
    assert (found.passed, found.problems) == (True, [])
    files = (tmp_path / "out" / "transformer_2").glob("*.safetensors")
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {np.dtype(np.float32)}


def test_a_fault_of_the_second_component_leaves_nothing_of_the_first(experts: Experts, tmp_path: Path) -> None:
    broken = tiny.weights(seed=1)
    broken["transformer_blocks.1.attn.to_q.weight"][3, 3] = np.nan
    base = write(tmp_path / "base", more={"transformer_2": broken})
    loras = [LoraInput("h", experts.high, 1.0), LoraInput("l", experts.low, 1.0, "transformer_2")]
    with pytest.raises(BadCheckpoint, match=r"transformer_2.*transformer_blocks\.1\.attn\.to_q.*nothing was written"):
        lora_fuse.fuse(lora_fuse.plan(base, loras), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    assert not manifest_path(tmp_path / "out").exists()


def test_a_text_encoder_s_folder_is_a_base_where_its_component_is_named(encoders: Encoders, tmp_path: Path) -> None:
    tensors = kohya("lora_te1_", TEXT, (16, 16), 6)
    loras = [LoraInput("l", tiny.write_lora(tmp_path / "te.safetensors", tensors), 1.0, "text_encoder")]
    lora_fuse.fuse(lora_fuse.plan(encoders.base / "text_encoder", loras), tmp_path / "out", device="cpu")
    assert lora_fuse.verify(tmp_path / "out", encoders.base / "text_encoder", loras, rows="all").passed


def test_loras_of_several_components_are_not_kept_beside_a_base(experts: Experts, tmp_path: Path) -> None:
    loras = [LoraInput("h", experts.high, 1.0), LoraInput("l", experts.low, 1.0, "transformer_2")]
    with pytest.raises(Refused, match="of one component are kept beside"):
        lora_fuse.fuse(lora_fuse.plan(experts.base, loras), tmp_path / "out", side_channel=True)
    assert not (tmp_path / "out").exists()
