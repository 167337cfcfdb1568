"""Extract and unmerge: what is promised of a LoRA is what its fuse leaves; what is refused leaves nothing."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file
from threadpoolctl import threadpool_limits

import lora_fuse
from lora_fuse import cli
from lora_fuse.differences.taking_out import Extracted, extract, unmerge
from lora_fuse.differences.taking_out.low_rank import MORE, decompose, least_rank
from lora_fuse.errors import BadCheckpoint, BadConfig, Refused
from lora_fuse.lora import LoraInput
from tests.support import tiny

Float32 = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]

ROOT = Path(__file__).resolve().parents[2]
POCKET_LORA = ROOT / "pocket/lora/pocket-lightning-4steps-v1.safetensors"
SCALE = 0.8


def wide(root: Path) -> dict[str, Wide]:
    """All tensors below a folder, or of a file, as float64."""
    paths = [root] if root.is_file() else sorted(root.rglob("*.safetensors"))
    return {name: values.astype(np.float64) for path in paths for name, values in load_file(path).items()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """BLAS with one thread: those of several test processes would spin against each other."""
    with threadpool_limits(1, user_api="blas"):
        yield


def fused(base: Path, lora: Path, out: Path, scale: float = 1.0, dtype: str | None = None) -> Path:
    lora_fuse.fuse(lora_fuse.plan(base, [LoraInput("lora", lora, scale)], dtype=dtype), out)
    return out


def left_of(made: Extracted, base: Path, checkpoint: Path, again: Path) -> None:
    """The fuse of what was extracted leaves what was promised, weight by weight and over all."""
    before, wanted, after = (wide(root) for root in (base, checkpoint, again))
    total = np.zeros(2)
    for weight in made.weights:
        off = np.square(after[weight.name] - wanted[weight.name]).sum()
        meant = np.square(wanted[weight.name] - before[weight.name]).sum()
        assert np.sqrt(off / meant) == pytest.approx(weight.left.residual, rel=0.02, abs=1e-6), weight.name
        total += [off, meant]
    assert np.sqrt(total[0] / total[1]) == pytest.approx(made.total.residual, rel=0.02, abs=1e-6)
    others = wanted.keys() - {weight.name for weight in made.weights}
    assert all(np.array_equal(after[name], wanted[name]) for name in others)


def test_what_is_left_of_a_rank_is_near_the_least_and_the_rank_that_a_residual_needs_is_bounded() -> None:
    rng = np.random.default_rng(1)
    flat = rng.standard_normal((500, 700), dtype=np.float32)  # singular values that hardly fall are the worst
    values = np.linalg.svd(flat.astype(np.float64), compute_uv=False)
    rank = 20
    found = decompose(flat, rank, seed=3)
    assert rank + MORE < min(flat.shape)  # so it was not decomposed as a whole
    up, down = found.factors(rank)
    left = float(np.linalg.norm(flat - up @ down))
    least = float(np.linalg.norm(values[rank:]))
    assert least <= left <= 1.01 * least
    energy = float((values**2).sum())
    for needed in (5, 300):
        share = float((values[needed:] ** 2).sum()) / energy
        assert least_rank(found, energy, share * 1.0001) <= needed + 2  # a bound, and no more than is so
        assert least_rank(found, energy, share * 1.0001) >= min(needed, rank) / 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_lora_comes_back_at_its_own_rank_within_the_rounding_of_the_checkpoint(tmp_path: Path, dtype: str) -> None:
    """Off by 2 sqrt(2 r) times the largest singular value of what rounding added, r being the rank, and no more.

    The nearest of rank r is no further than the LoRA itself from the difference, by that value; so both are within
    twice of it, and their difference has rank 2 r.
    """
    base = tmp_path / "base"
    fused(ROOT / "pocket/model", POCKET_LORA, base, 0.0, dtype if dtype == "float16" else None)
    for path in base.rglob("*.safetensors"):  # at a scale of 0 it is the base, and says that it is merged
        save_file(load_file(path), path)
    merged = fused(base, POCKET_LORA, tmp_path / "merged", SCALE)
    made = extract(merged, base, tmp_path / "lora.safetensors", rank=8)
    assert {weight.form for weight in made.weights} == {"rank 8"}
    assert len(made.weights) == 56  # of the 60 modules of the LoRA 4 are all zeros
    left_of(made, base, merged, fused(base, made.path, tmp_path / "again"))
    given, found, before, after = (wide(root) for root in (POCKET_LORA, made.path, base, merged))
    shares = []
    for weight in made.weights:
        module = weight.name.removesuffix(".weight")
        factor = SCALE * float(given[f"{module}.alpha"]) / 8
        meant = factor * given[f"{module}.lora_up.weight"] @ given[f"{module}.lora_down.weight"]
        got = found[f"transformer.{module}.lora_B.weight"] @ found[f"transformer.{module}.lora_A.weight"]
        rounding = np.linalg.norm(after[weight.name] - before[weight.name] - meant, 2)
        shares.append(float(np.linalg.norm(got - meant) / (2 * np.sqrt(2 * 8) * rounding)))
    assert 0.05 < max(shares) < 1
    assert made.total.residual < {"bfloat16": 0.01, "float16": 0.002}[dtype]
    assert made.total.equal > 0.7 * made.total.size


def changed(tensors: Mapping[str, Float32]) -> dict[str, Float32]:
    """A matrix by a rank of 3 and of a convolution, a bias, a norm and a parameter with its own name by all of it."""
    rng = np.random.default_rng(9)
    made = dict(tensors)
    for name in ("conv_in.weight", "down_blocks.1.attentions.0.proj_in.weight"):
        shape = tensors[name].shape
        up, down = rng.standard_normal((shape[0], 3)), rng.standard_normal((3, int(np.prod(shape[1:]))))
        made[name] = (tensors[name] + 0.1 * (up @ down).reshape(shape)).astype(np.float32)
    for name in ("conv_in.bias", "conv_norm_out.weight"):
        made[name] = (tensors[name] + rng.standard_normal(tensors[name].shape)).astype(np.float32)
    return made


def test_convolutions_are_factored_and_what_is_no_matrix_is_whole(tmp_path: Path) -> None:
    from tests.tiny_models import tiny_transformer

    tensors = {name: values.numpy() for name, values in tiny_transformer("sdxl").state_dict().items()}
    roots = []
    for name, values in (("base", tensors), ("other", changed(tensors))):
        roots.append(tiny.write_component(tmp_path / name, values))
        (roots[-1] / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    base, other = roots
    made = extract(other, base, tmp_path / "lora.safetensors", residual=0.01)
    assert {weight.name: weight.form for weight in made.weights} == {
        "conv_in.weight": "rank 3",
        "conv_in.bias": "whole",
        "conv_norm_out.weight": "whole",
        "down_blocks.1.attentions.0.proj_in.weight": "rank 3",
    }
    found = load_file(made.path)
    assert found["unet.conv_in.lora_A.weight"].shape == (3, 4, 3, 3)
    assert found["unet.conv_in.lora_B.weight"].shape == (8, 3, 1, 1)
    assert {"unet.conv_in.diff_b", "unet.conv_norm_out.diff"} < found.keys()
    left_of(made, base, other, fused(base, made.path, tmp_path / "again"))
    assert made.total.residual < 0.01
    mixed = lora_fuse.open_lora(extract(other, base, tmp_path / "few.safetensors", rank=1, dtype="bfloat16").path)
    found_dtypes = [tensor.dtype for tensor in mixed.header.tensors.values()]
    assert found_dtypes == sorted(found_dtypes, reverse=True)  # wide ones first: each is aligned
    assert set(found_dtypes) == {"F32", "BF16"}
    few = extract(other, base, tmp_path / "few.safetensors", rank=2, dtype="float16", matrices_only=True)
    assert {weight.form for weight in few.weights} == {"rank 2", "left out"}
    assert {values.dtype for name, values in load_file(few.path).items() if "lora_" in name} == {np.dtype(np.float16)}
    assert 0.1 < few.total.residual < 1
    model = tiny_transformer("sdxl")
    loaded = {key: torch.from_numpy(values) for key, values in load_file(few.path).items()}
    load: Any = model.load_lora_adapter
    load(loaded, prefix="unet")  # of diffusers
    names = {name for name, _ in model.named_modules() if name.endswith("lora_A.default_0")}
    assert names == {
        "conv_in.lora_A.default_0",
        "down_blocks.1.attentions.0.proj_in.lora_A.default_0",
    }


def test_a_difference_that_no_small_rank_holds_is_whole(tmp_path: Path) -> None:
    tensors = {name: values.astype(np.float32) for name, values in tiny.weights().items()}
    name = "transformer_blocks.0.attn.to_q.weight"
    noise = np.random.default_rng(4).standard_normal(tensors[name].shape).astype(np.float32)
    base = tiny.write_component(tmp_path / "base", tensors)
    other = tiny.write_component(tmp_path / "other", tensors | {name: (tensors[name] + noise).astype(np.float32)})
    made = extract(other, base, tmp_path / "lora.safetensors", residual=0.05)
    assert [(weight.form, weight.left.residual < 1e-6) for weight in made.weights] == [("whole", True)]
    left_of(made, base, other, fused(base, made.path, tmp_path / "again"))


def test_the_commands_answer_on_a_terminal_and_as_json_and_refuse_what_they_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.write_pipeline(tmp_path / "base", tiny.weights())
    lora = tiny.write_lora(tmp_path / "given.safetensors", tiny.lora_tensors())
    merged = fused(base, lora, tmp_path / "merged", SCALE)
    out = tmp_path / "lora.safetensors"
    given = ["extract", str(merged), "--base", str(base), "-o", str(out)]
    assert cli.main([*given, "--rank", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["weight", "in"]
    assert "6 of 6 weights that differ; 8 do not" in lines[-3]
    assert cli.main([*given, "--residual", "0.2", "--json"]) == 0
    (answer,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert answer["residual"] <= 0.2
    header = json.loads(lora_fuse.open_lora(out).header.metadata["lora_fuse.extracted"])
    assert {name: weight["residual"] for name, weight in header["weights"].items()} == {
        name: weight["residual"] for name, weight in answer["weights"].items()
    }
    unmerged = ["unmerge", str(merged), str(tmp_path / "undone"), "--lora", str(lora), "--scale", str(SCALE)]
    assert cli.main([*unmerged, "--base-like", str(base)]) == 0
    assert "are the base's" in capsys.readouterr().out.splitlines()[0]
    assert cli.main([*unmerged, "--json"]) == 0
    (counted,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert counted["certain"] + counted["uncertain"] == counted["elements"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    foreign = tmp_path / "given.safetensors"
    broken = tiny.weights()
    broken["norm.weight"] = np.full(16, np.nan, tiny.BF16)
    for arguments, words in (
        ([*given, "--rank", "4", "--residual", "0.2"], "give --rank R, or --residual X"),
        ([*given, "--rank", "0"], "--rank is 0"),
        ([*given, "--residual", "1.5"], "--residual is 1.5"),
        ([*given[:-1], str(foreign), "--rank", "1"], "did not extract"),
        ([*given[:-1], str(tmp_path / "lora.bin"), "--rank", "1"], "name it lora.safetensors"),
        (["unmerge", str(base), str(tmp_path / "no"), "--lora", str(lora)], "does not have these LoRAs"),
        ([*unmerged, "--base-like", str(lora)], "have not the same weights"),
    ):
        assert cli.main(list(arguments)) == 2
        assert words in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if not path.name.endswith(".lock")} == {
        path: time for path, time in before.items() if not path.name.endswith(".lock")
    }
    nan = tiny.write_pipeline(tmp_path / "nan", broken)
    same = tiny.write_pipeline(tmp_path / "same", tiny.weights())
    double = tiny.write_pipeline(tmp_path / "double", tiny.weights(np.float32))
    for call, kind, words in (
        (lambda: extract(nan, base, tmp_path / "n.safetensors", rank=1), BadCheckpoint, "NaN or infinity"),
        (lambda: extract(same, base, tmp_path / "n.safetensors", rank=1), Refused, "there is nothing to extract"),
        (lambda: extract(same, base, tmp_path / "n.safetensors"), BadConfig, "give --rank R"),
        (
            lambda: unmerge(merged, [LoraInput("l", lora, SCALE)], tmp_path / "n", base_like=double),
            BadCheckpoint,
            r"is BF16 .*, and in .* F32 .*: what is taken out has the merge's dtype",
        ),
    ):
        with pytest.raises(kind, match=words):
            call()
    assert not list(tmp_path.glob("n.safetensors*")) + list(tmp_path.glob(".n.*partial*"))


def test_the_commands_of_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("### Ask a checkpoint")[2]
    block = section.split("```\n")[3]  # the second of the section
    base = tiny.write_pipeline(tmp_path / "BASE", tiny.weights())
    lora = tiny.write_lora(tmp_path / "LORA", tiny.lora_tensors())
    fused(base, lora, tmp_path / "CKPT")
    monkeypatch.chdir(tmp_path)
    commands = [line.split() for line in block.splitlines()]
    assert {"extract", "unmerge"} <= {command[3] for command in commands}
    for command in commands:
        assert command[:3] == ["python", "-m", "lora_fuse"]
        assert cli.main(command[3:]) == 0, command
    assert (tmp_path / "LORA.safetensors").is_file()
    assert (tmp_path / "OUT/model_index.json").is_file()
