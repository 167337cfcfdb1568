"""Laws of choosing modules: what is left out keeps its bytes, what is scaled is, a mistyped pattern is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_fuse.checkpoint.shards import PROVENANCE, open_checkpoint, read_header
from lora_fuse.errors import BadCheckpoint, BadConfig, BadLora, BadScale, Refused
from lora_fuse.fusion.manifest import build_manifest
from lora_fuse.fusion.merge import write_merged
from lora_fuse.fusion.plan import Plan, make_plan
from lora_fuse.lora.inputs import LoraInput, Selection
from lora_fuse.verification.rederivation import Expectation, Verification, verify_merge
from tests.support import tiny

Q0 = "transformer_blocks.0.attn.to_q.weight"
MLP1 = "transformer_blocks.1.img_mlp.net.0.proj.weight"


class Place:
    """A base and a LoRA for it."""

    def __init__(self, folder: Path, scale: float = 1.0) -> None:
        self.base = tiny.write_component(folder / "base", tiny.weights())
        self.lora = LoraInput("l", tiny.write_lora(folder / "l.safetensors", tiny.lora_tensors()), scale)
        self.out = folder / "out"

    def plan(self, selection: Selection, label: str | None = None) -> Plan:
        return make_plan(open_checkpoint(self.base, label=label), [self.lora], selection)

    def fuse(self, selection: Selection, label: str | None = None) -> dict[str, tiny.Array]:
        write_merged(
            self.plan(selection, label), self.out, device="cpu", generated={}, known={}, progress=lambda _: None
        )
        return {name: tensor for file in self.out.glob("*.safetensors") for name, tensor in load_file(file).items()}

    def verify(self, selection: Selection) -> Verification:
        return verify_merge(
            self.out, self.base, [self.lora], component="", rows=None, expected=Expectation(), selection=selection
        )


def changed(weights: dict[str, tiny.Array]) -> set[str]:
    before = tiny.weights()
    return {name for name in before if weights[name].tobytes() != before[name].tobytes()}


def test_only_and_skip_leave_the_rest_as_it_was(tmp_path: Path) -> None:
    place = Place(tmp_path)
    chosen = Selection(only=("*.attn.*",), skip=("*_blocks.1.*",))
    assert changed(place.fuse(chosen)) == {Q0, "transformer_blocks.0.attn.to_out.0.weight"}
    assert place.verify(chosen).passed
    assert not place.verify(Selection()).passed
    assert not place.verify(Selection(only=("*.to_q",))).passed


def test_a_module_may_have_a_scale_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    half = Place(tmp_path / "a", 0.5).fuse(Selection())
    place, chosen = Place(tmp_path / "b"), Selection(scales={"*.to_q": 0.5, "*.attn.*": 0.0})
    mixed = place.fuse(chosen)
    assert mixed[Q0].tobytes() == half[Q0].tobytes()
    assert mixed[MLP1].tobytes() != half[MLP1].tobytes()
    assert "transformer_blocks.0.attn.to_out.0.weight" not in changed(mixed)
    assert place.verify(chosen).passed
    assert not place.verify(Selection(scales={"*.to_q": 0.6, "*.attn.*": 0.0})).passed


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        (Selection(only=("attn",)), r"only: 'attn' matches none of the 6 modules"),
        (Selection(skip=("*.to_x",)), r"skip: '\*\.to_x' matches none"),
        (Selection(scales={"*.to_x": 1.0}), r"scales: '\*\.to_x' matches none"),
        (Selection(skip=("*",)), "leave nothing to fuse"),
    ],
)
def test_a_pattern_that_does_nothing_is_refused(tmp_path: Path, selection: Selection, said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        Place(tmp_path).plan(selection)


TEXT = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"


def add_keys(place: Place, *modules: str) -> None:
    tensors = tiny.lora_tensors()
    for module in modules:
        tensors |= {f"{module}.{side}.weight": np.ones((4, 4), np.float32) for side in ("lora_down", "lora_up")}
    tensors["bundle_emb.a.string_to_param.*"] = np.ones((1, 4), np.float32)
    tiny.write_lora(place.lora.path, tensors)


def test_keys_that_the_base_has_no_module_for_are_left_out_by_name_and_nothing_else_changes(tmp_path: Path) -> None:
    place = Place(tmp_path)
    plain = place.fuse(Selection())
    add_keys(place, TEXT, "transformer_blocks.0.k_img")
    chosen = Selection(leave_out=("lora_te*", "*.k_img.*", "bundle_emb.*"))
    for missing in range(3):
        fewer = tuple(pattern for at, pattern in enumerate(chosen.leave_out) if at != missing)
        with pytest.raises(BadLora, match="--leave-out PATTERN"):
            place.plan(Selection(leave_out=fewer))
    plan = place.plan(chosen)
    (listed,) = build_manifest(plan, {}).loras
    assert (len(listed.left_out), listed.left_out[0]) == (5, "bundle_emb.a.string_to_param.*")
    assert json.loads(plan.provenance)["leave_out"] == list(chosen.leave_out)
    left = place.fuse(chosen)
    assert all(left[name].tobytes() == tensor.tobytes() for name, tensor in plain.items())
    found = place.verify(chosen)
    assert found.passed
    assert found.left_out == 5
    assert not place.verify(Selection(leave_out=chosen.leave_out[1:])).passed


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("*.v_img.*", "'*.v_img.*' names no key of the LoRA"),
        ("*.attn.*", "names 12 keys of 12 whose modules are in the base, first 'transformer_blocks.0.attn.to_out.0"),
        ("*", "whose modules are in the base|are left out"),
    ],
)
def test_a_pattern_that_leaves_out_nothing_that_is_refused_is_refused(tmp_path: Path, pattern: str, said: str) -> None:
    place = Place(tmp_path)
    add_keys(place)
    with pytest.raises(Refused, match=re.escape(said) if "|" not in said else said):
        place.plan(Selection(leave_out=("bundle_emb.*", pattern)))


def test_verification_finds_for_itself_that_a_module_was_left_out_which_the_base_has(tmp_path: Path) -> None:
    place = Place(tmp_path)
    skipped = Selection(skip=("*.attn.*",))
    place.fuse(skipped)
    assert place.verify(skipped).passed
    assert any("the base has its module" in one for one in place.verify(Selection(leave_out=("*.attn.*",))).problems)


def test_the_patterns_say_what_they_reach(tmp_path: Path) -> None:
    plan = Place(tmp_path).plan(Selection(only=("*.attn.*",), skip=("*.1.attn.to_q",)))
    reached = {pattern: len(modules) for pattern, modules in plan.reach.items()}
    assert reached == {"only *.attn.*": 4, "skip *.1.attn.to_q": 1}


def test_a_scale_that_is_not_finite_is_refused() -> None:
    with pytest.raises(BadScale, match="nan"):
        Selection(scales={"*": float("nan")})


def test_the_manifest_records_the_choice(tmp_path: Path) -> None:
    place, chosen = Place(tmp_path), Selection(only=("*.attn.*",), scales={"*.to_q": 0.5})
    manifest = build_manifest(place.plan(chosen), {})
    assert manifest.selection is not None
    assert (manifest.selection.only, manifest.selection.scales) == (("*.attn.*",), {"*.to_q": 0.5})
    assert manifest.targets == 4
    assert build_manifest(place.plan(Selection()), {}).selection is None


def test_a_fused_shard_says_what_was_fused_and_keeps_the_bases_metadata(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.fuse(Selection(only=("*.attn.*",)), label="owner/name@0123")
    metadata = read_header(next(place.out.glob("*.safetensors"))).metadata
    assert metadata["format"] == "pt"
    said = json.loads(metadata[PROVENANCE])
    assert said["base"] == "owner/name@0123"
    assert said["loras"] == [{"sha256": place.plan(Selection()).loras[0].sha256, "scale": 1.0}]
    assert said["only"] == ["*.attn.*"]


def test_a_base_that_is_merged_already_is_refused(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.fuse(Selection())
    with pytest.raises(BadCheckpoint, match="is merged already"):
        make_plan(open_checkpoint(place.out), [place.lora])


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (place.base / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(BadCheckpoint, match=r"is quantised .*bitsandbytes"):
        place.plan(Selection())
