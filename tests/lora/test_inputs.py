"""Laws of choosing modules: what is left out keeps its bytes, what is scaled is, a mistyped pattern is refused."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from lora_fuse.checkpoint.shards import PROVENANCE, open_checkpoint, read_header
from lora_fuse.errors import BadCheckpoint, BadConfig, BadScale
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
