"""Laws of explain: scales and ways come out of the bytes, what is left has a rank and blocks, nothing is claimed."""

import json
import shlex
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_fuse import LoraInput, fuse, plan
from lora_fuse.cli import main
from lora_fuse.differences.explaining import Explanation, explain, explain_html
from lora_fuse.differences.explaining.explain_verdict import of_lora, verdict
from lora_fuse.errors import BadCheckpoint, BadLora
from tests.support import tiny
from tests.tiny_models.denoisers import DENOISERS

ROOT = Path(__file__).resolve().parents[2]
Tensors = dict[str, torch.Tensor]
BLOCKS = 8
SHAPES = {"attn.to_q": (64, 64), "mlp": (96, 64)}
SPREAD = 0.03
SIZES = {torch.bfloat16: "BF16", torch.float16: "F16"}
FLOATS = pytest.mark.parametrize("dtype", SIZES, ids=list(SIZES.values()))
ON_A_GPU = (pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"))


def weights(dtype: torch.dtype, seed: int = 0) -> Tensors:
    stream = torch.Generator().manual_seed(seed)
    made = {}
    for block in range(BLOCKS):
        for linear, shape in SHAPES.items():
            name = f"transformer_blocks.{block}.{linear}"
            made[f"{name}.weight"] = (torch.randn(*shape, generator=stream) * SPREAD).to(dtype)
            made[f"{name}.bias"] = (torch.randn(shape[0], generator=stream) * SPREAD).to(dtype)
    return made


def lora(seed: int, rank: int = 4, size: float = 0.1, blocks: Sequence[int] = range(BLOCKS)) -> Tensors:
    """A LoRA whose deltas have so many times the size of the weights."""
    stream = torch.Generator().manual_seed(100 + seed)
    made = {}
    for block in blocks:
        for linear, (rows, columns) in SHAPES.items():
            name = f"transformer_blocks.{block}.{linear}"
            each = (size * SPREAD / rank**0.5) ** 0.5
            made[f"{name}.lora_down.weight"] = (torch.randn(rank, columns, generator=stream) * each).to(torch.bfloat16)
            made[f"{name}.lora_up.weight"] = (torch.randn(rows, rank, generator=stream) * each).to(torch.bfloat16)
            made[f"{name}.alpha"] = torch.tensor(float(rank))
    return made


class Place:
    """A folder with a base, and LoRAs that are fused into it."""

    def __init__(self, folder: Path, base: Tensors) -> None:
        self.folder = folder
        self.base = folder / "base.safetensors"
        self.tensors = base
        folder.mkdir(parents=True, exist_ok=True)
        save_file(base, self.base)

    def write(self, name: str, tensors: Tensors) -> Path:
        path = self.folder / f"{name}.safetensors"
        save_file(tensors, path)
        return path

    def merged(self, given: Mapping[Path, float], dtype: str | None = None) -> Path:
        """Our own merge of files at scales."""
        out = self.folder / "merged.safetensors"
        inputs = [LoraInput(path.stem, path, scale) for path, scale in given.items()]
        fuse(plan(self.base, inputs, dtype=dtype), out, device="cpu", replace=True)
        return out


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, weights(torch.bfloat16))


def scales_of(explained: Explanation) -> list[float]:
    return [lora.scale for lora in explained.loras]


@pytest.mark.parametrize(
    ("dtype", "size", "given"),
    [(torch.float16, 0.1, (0.8, 0.35, -0.5)), (torch.bfloat16, 0.004, (1.0, 0.125, 0.6))],
    ids=["F16", "BF16"],
)
def test_our_merge_of_one_to_three_is_told_exactly_also_where_most_weights_do_not_move(
    tmp_path: Path, dtype: torch.dtype, size: float, given: tuple[float, ...]
) -> None:
    place = Place(tmp_path, weights(dtype))
    paths = [place.write(f"l{number}", lora(number, size=size)) for number in range(3)]
    for count in (1, 3):
        explained = explain(place.merged(dict(zip(paths[:count], given, strict=False))), place.base, paths)
        assert scales_of(explained) == [*given[:count], *[0.0] * (3 - count)]
        named = " + ".join(f"l{number} at {given[number]:g}" for number in range(count))
        assert verdict(explained) == f"exactly BASE + {named} (rounded once)"
        assert [one.found for one in explained.loras] == [number < count for number in range(3)]
        assert explained.loras[0].error < 2e-3


def by_comfyui(base: Tensors, given: Sequence[tuple[Tensors, float]], compute: torch.dtype) -> Tensors:
    """As ComfyUI's `patch_weight_to_device` (comfy/model_patcher.py) with `calculate_weight` (comfy/lora.py)."""
    made = {}
    for name, weight in base.items():
        total = weight.to(compute, copy=True)
        for factors, scale in given if name.endswith(".weight") else ():
            module = name.removesuffix(".weight")
            up, down = (factors[f"{module}.lora_{role}.weight"].float() for role in ("up", "down"))
            alpha = float(factors[f"{module}.alpha"]) / len(down)
            total += ((scale * alpha) * torch.mm(up, down)).type(compute)
        made[name] = total.to(weight.dtype)
    return made


@pytest.mark.parametrize("compute", [torch.float32, torch.float16], ids=["F32", "F16"])
@FLOATS
def test_comfyui_s_sums_are_told_apart_and_their_scales_found(
    tmp_path: Path, dtype: torch.dtype, compute: torch.dtype
) -> None:
    place = Place(tmp_path, weights(dtype))
    loras = [lora(0), lora(1)]
    paths = [place.write(f"l{number}", one) for number, one in enumerate(loras)]
    made = place.write("made", by_comfyui(place.tensors, list(zip(loras, (0.8, 0.6), strict=True)), compute))
    explained = explain(made, place.base, paths)
    assert scales_of(explained) == [0.8, 0.6]
    assert explained.missed <= 1e-3 * explained.moved
    once = verdict(explained).endswith("(rounded once)")  # float32 shows in one value of 10,000
    assert once or "ComfyUI" in verdict(explained)
    assert ("on a GPU" in verdict(explained)) == (compute == torch.float16)


@pytest.mark.filterwarnings("ignore:Already found")
@pytest.mark.parametrize(("device", "times"), [("cpu", "twice"), pytest.param("cuda", "three times", marks=ON_A_GPU)])
@FLOATS
def test_what_diffusers_fuses_is_told_by_its_roundings(
    tmp_path: Path, dtype: torch.dtype, device: str, times: str
) -> None:
    """Its own `load_lora_adapter` and `fuse_lora`; the LoRA is float32, and diffusers takes it in the model's dtype."""
    settings = {"num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
    model: Any = DENOISERS["qwen_image"].make(**settings).to(dtype)
    model.save_pretrained(tmp_path / "base")
    model.to(device)
    stream = torch.Generator().manual_seed(5)
    names = [f"transformer_blocks.{block}.attn.to_{kind}" for block in range(2) for kind in "qkv"]
    shapes = {name: model.get_parameter(f"{name}.weight").shape for name in names}
    paths = []
    for number in range(2):
        factors = {}
        for name, (rows, columns) in shapes.items():
            factors[f"transformer.{name}.lora_A.weight"] = torch.randn(4, columns, generator=stream) * 0.1
            factors[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 4, generator=stream) * 0.05
        paths.append(tmp_path / f"l{number}.safetensors")
        save_file(factors, paths[-1])
        model.load_lora_adapter(factors, prefix="transformer", adapter_name=f"l{number}")
    model.set_adapters(["l0", "l1"], [0.8, 0.35])
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(tmp_path / "fused")
    explained = explain(tmp_path / "fused", tmp_path / "base", paths)
    assert scales_of(explained) == [0.8, 0.35]
    assert f"rounded {times}" in verdict(explained)
    assert "as diffusers does" in verdict(explained)
    assert explained.missed <= 1e-3 * explained.moved
    assert not explained.unexplained


def test_what_else_is_in_it_has_a_rank_and_blocks_in_part_of_them_or_in_all(place: Place) -> None:
    known = place.write("known", lora(0))
    some = place.write("some", lora(7, rank=3, blocks=range(3, 6)))
    every = place.write("every", lora(8, rank=3))
    other = place.write("other", lora(9))
    explained = explain(place.merged({known: 0.8, some: 1.0}), place.base, [known, other])
    assert verdict(explained) == (
        "exactly BASE + known at 0.8 (rounded once), plus something of rank 3 or so in blocks 3 to 5"
    )
    assert [block.block for block in explained.blocks if block.unexplained] == ["3", "4", "5"]
    explained = explain(place.merged({known: 0.8, every: 1.0}), place.base, [known, other])
    assert explained.loras[0].scale == pytest.approx(0.8, abs=1e-3)
    assert [one.found for one in explained.loras] == [True, False]
    assert "plus something of rank 3 or so in all blocks" in verdict(explained)
    unasked = explain(place.merged({known: 0.8}), place.base)
    assert verdict(unasked) == "BASE, plus something of rank 4 or so in all blocks"


def test_another_version_another_base_and_a_finetune_are_no_lora(place: Place) -> None:
    asked = place.write("asked", lora(0))
    stream = torch.Generator().manual_seed(3)

    def shaken(tensors: Tensors, share: float) -> Tensors:
        return {
            key: (value.float() + share * value.float().std() * torch.randn(value.shape, generator=stream)).to(
                value.dtype
            )
            if value.ndim > 1
            else value
            for key, value in tensors.items()
        }

    version = place.write("version", shaken(lora(0), 0.2))
    explained = explain(place.merged({version: 1.0}), place.base, [asked])
    assert not explained.found
    assert "something like it is" in of_lora(explained.loras[0], explained)
    for made, words in (
        (weights(torch.bfloat16, seed=1), "another base: the cosine"),
        (shaken(place.tensors, 0.1), "BASE trained on as a whole, or another version of it"),
    ):
        explained = explain(place.write("made", made), place.base, [asked])
        assert verdict(explained).startswith(words)
        assert not explained.found


def test_a_scale_that_rounding_hides_is_said_with_the_smallest_that_would_show(place: Place) -> None:
    faint = place.write("faint", lora(0, size=1e-4))
    explained = explain(place.merged({faint: 1e-4}), place.base, [faint])
    assert explained.is_equal
    (one,) = explained.loras
    assert f"from a scale of {one.smallest:.2g} on it would show, below that rounding hides it" in of_lora(
        one, explained
    )
    shown = explain(place.merged({faint: 3 * one.smallest}), place.base, [faint])
    assert shown.loras[0].found
    assert shown.loras[0].scale == pytest.approx(3 * one.smallest, rel=0.5)


def test_a_base_in_float32_is_rounded_and_said_so(tmp_path: Path) -> None:
    place = Place(tmp_path, weights(torch.float32))
    asked = place.write("l", lora(0))
    cast = place.write("cast", {name: value.to(torch.bfloat16) for name, value in place.tensors.items()})
    explained = explain(cast, place.base, [asked])
    assert verdict(explained) == "BASE itself, rounded to BF16: no weight differs"
    for dtype in ("float16", "float32"):
        explained = explain(place.merged({asked: 0.8}, dtype), place.base, [asked])
        assert verdict(explained) == "exactly BASE + l at 0.8 (rounded once)"


def test_what_cannot_be_asked_is_refused_on_one_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    asked = place.write("asked", lora(0))
    merged = place.merged({asked: 0.8})
    strange = place.write("strange", {f"nope.{key}": value for key, value in lora(0).items()})
    twice = place.write("twice", {key: value * 2 if "up" in key else value for key, value in lora(0).items()})
    wide = place.write("wide", {name: torch.cat([value, value]) for name, value in place.tensors.items()})
    for given, words in (
        ([merged, "--base", merged], "are one place"),
        ([merged, "--base", wide], "two architectures"),
        ([merged, "--base", place.base, "--lora", strange], "none of 16 modules is in the base"),
        ([merged, "--base", place.base, "--lora", asked, "--lora", asked], "is given twice"),
        ([merged, "--base", place.base, "--lora", asked, "--lora", twice], "no checkpoint tells their scales apart"),
        ([merged, "--base", place.base, "--rows", "none"], "--rows is 'none'"),
        ([merged, "--base", place.base, "--lora", asked, *["--component", "unet"] * 2], "1 --lora and 2 --component"),
        ([merged, "--base", place.base, "--lora", place.base], "32 of 32 keys belong to no"),
    ):
        assert main(["explain", *map(str, given)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert words in printed.err
    with pytest.raises((BadCheckpoint, BadLora)):
        explain(merged, place.folder / "nothing", [asked])


def test_the_command_says_prints_json_and_writes_a_page(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    asked = place.write("<b>asked", lora(0, blocks=range(4)))
    merged = place.merged({asked: 0.8})
    page = place.folder / "explain.html"
    command = ["explain", str(merged), "--base", str(place.base), "--lora", str(asked), "--html", str(page)]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("explain: exactly BASE + <b>asked at 0.8 (rounded once)\n")
    written = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;asked" in written
    assert "<b>asked" not in written.replace("<b>&lt;b&gt;asked", "")
    assert written.count('class="difference"') == BLOCKS
    assert main([*command[:-2], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["exact"], said["way"], said["loras"][0]["scale"]) == (True, "once", 0.8)
    assert said["tensors"]["transformer_blocks.0.mlp.weight"]["differing"] > 0
    assert said["tensors"]["transformer_blocks.7.mlp.weight"]["differing"] == 0
    few = explain(merged, place.base, [asked], rows=4)
    assert (few.rows, verdict(few)) == (4, said["verdict"])
    assert "4 rows of each" in explain_html(few)


def test_a_lora_for_each_of_two_transformers_is_found_in_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of Wan 2.2: keys do not say which of them a LoRA is for."""
    for place in ("base", "merged"):
        tiny.write_pipeline(tmp_path / place, tiny.weights())
        tiny.write_component(tmp_path / place / "transformer_2", tiny.weights(seed=1))
        index = json.loads((tmp_path / place / "model_index.json").read_text())
        index["transformer_2"] = index["transformer"]
        (tmp_path / place / "model_index.json").write_text(json.dumps(index))
    loras = [
        tiny.write_lora(tmp_path / f"{name}.safetensors", tiny.lora_tensors(seed=n)) for n, name in enumerate("ab")
    ]
    parts = ("transformer", "transformer_2")
    inputs = [LoraInput(path.stem, path, 0.5, part) for path, part in zip(loras, parts, strict=True)]
    fuse(plan(tmp_path / "base", inputs), tmp_path / "merged", device="cpu", replace=True)
    given = [one for path, part in zip(loras, parts, strict=True) for one in ("--lora", path, "--component", part)]
    assert main(["explain", *map(str, [tmp_path / "merged", "--base", tmp_path / "base", *given])]) == 0
    assert "explain: exactly BASE + a at 0.5 + b at 0.5 (rounded once)\n" in capsys.readouterr().out


def test_names_of_the_other_spelling_are_one_model(tmp_path: Path) -> None:
    """Z-Image: three weights of the base are one of the checkpoint, as ComfyUI has it."""
    rng = np.random.default_rng(3)
    base = {
        f"layers.{block}.attention.to_{kind}.weight": (rng.standard_normal((64, 64)) * SPREAD).astype(tiny.BF16)
        for block in range(3)
        for kind in "qkv"
    }
    tiny.write_component(tmp_path / "base", base)
    factors = {}
    for name in base:
        module = name.removesuffix(".weight")
        factors[f"transformer.{module}.lora_A.weight"] = (rng.standard_normal((2, 64)) * 0.05).astype(np.float32)
        factors[f"transformer.{module}.lora_B.weight"] = (rng.standard_normal((64, 2)) * 0.05).astype(np.float32)
    path = tiny.write_lora(tmp_path / "l.safetensors", factors)
    fuse(plan(tmp_path / "base", [LoraInput("l", path, 0.7)]), tmp_path / "out", device="cpu")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    merged = {name: value for shard in shards for name, value in load_file(shard).items()}
    joined = {
        f"model.diffusion_model.layers.{block}.attention.qkv.weight": torch.cat(
            [merged[f"layers.{block}.attention.to_{kind}.weight"] for kind in "qkv"]
        )
        for block in range(3)
    }
    save_file(joined, tmp_path / "comfyui.safetensors")
    explained = explain(tmp_path / "comfyui.safetensors", tmp_path / "base", [path])
    assert verdict(explained) == "exactly BASE + l at 0.7 (rounded once)"


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """More blocks take no more; all of either model would be more than what is held at once."""
    peaks = []
    for blocks in (2, 5):
        stream = torch.Generator().manual_seed(1)
        base = {}
        factors = {}
        for block in range(blocks):
            name = f"transformer_blocks.{block}.attn.to_q"
            base[f"{name}.weight"] = (torch.randn(768, 768, generator=stream) * SPREAD).to(torch.bfloat16)
            factors[f"{name}.lora_down.weight"] = torch.randn(2, 768, generator=stream) * 0.03
            factors[f"{name}.lora_up.weight"] = torch.randn(768, 2, generator=stream) * 0.03
            factors[f"{name}.alpha"] = torch.tensor(2.0)
        place = Place(tmp_path / str(blocks), base)
        asked = place.write("l", factors)
        merged = place.merged({asked: 0.8})
        tracemalloc.start()
        explained = explain(merged, place.base, [asked])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert verdict(explained) == "exactly BASE + l at 0.8 (rounded once)"
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_the_commands_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("### Ask a checkpoint")[2]
    block, _, after = section.partition("```\n")[2].partition("```")
    commands = [shlex.split(line) for line in block.splitlines()]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pocket").symlink_to(ROOT / "pocket")
    for command in commands:
        assert command[:3] == ["python", "-m", "lora_fuse"]
        assert main(command[3:]) == 0
    promised = after.partition("says `")[2].partition("`")[0]
    said = capsys.readouterr().out
    assert f"explain: {promised}\n" in said
    assert "pocket-pastel is not in it" in said
    assert (tmp_path / "explain.html").is_file()
