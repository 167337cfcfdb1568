"""Laws of verification: a right merge passes, and each way to get it wrong is found."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as torch_save

from lora_fuse.checkpoint.diffusers_layout import diffusers_files
from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.cli import main
from lora_fuse.errors import BadCheckpoint, BadLora
from lora_fuse.fusion.merge import write_merged
from lora_fuse.fusion.plan import make_plan
from lora_fuse.lora.inputs import LoraInput
from lora_fuse.verification import byte_comparison
from lora_fuse.verification.nearest import is_nearest, neighbours, widen
from lora_fuse.verification.rederivation import Expectation, Verification, verify_merge
from lora_fuse.verification.weights import Weights, row_blocks
from tests.support import tiny

SHARD = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
EXPECTED = Expectation("QwenImageEditPlusPipeline", {"shift_terminal": None, "base_shift": 1.0})


class Merge:
    """A base, a LoRA and their merge on disk."""

    def __init__(self, folder: Path, style: str = "lightning", scale: float = 1.0) -> None:
        self.base = tiny.write_pipeline(folder / "base", tiny.weights())
        self.lora = LoraInput("l", tiny.write_lora(folder / "l.safetensors", tiny.lora_tensors(style)), scale)
        self.out = folder / "out"
        plan = make_plan(open_checkpoint(self.base), [self.lora])
        made = diffusers_files(self.base, pipeline=EXPECTED.pipeline, scheduler=EXPECTED.scheduler)
        write_merged(plan, self.out, device="cpu", generated=made, known={}, progress=lambda _: None)

    def verify(self, *loras: LoraInput, rows: int | None = None) -> Verification:
        given = loras or (self.lora,)
        return verify_merge(self.out, self.base, given, component="transformer", rows=rows, expected=EXPECTED)

    def change(self, name: str, change: float) -> None:
        tensors = load_file(self.out / SHARD)
        tensors[name] = tensors[name].copy()
        tensors[name].flat[0] += np.array(change, tensors[name].dtype)
        self.write(tensors)

    def write(self, tensors: dict[str, npt.NDArray[np.generic]], metadata: dict[str, str] | None = None) -> None:
        (self.out / SHARD).unlink()
        save_file(tensors, self.out / SHARD, metadata=metadata or {"format": "pt"})


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path)


@pytest.mark.parametrize("style", ["lightning", "diffusers", "peft"])
@pytest.mark.parametrize("rows", [1, 3, None])
def test_a_right_merge_passes(tmp_path: Path, style: str, rows: int | None) -> None:
    found = Merge(tmp_path, style, scale=0.7).verify(rows=rows)
    assert found.problems == []
    assert found.targets == found.modules == 6
    assert found.rows_checked == found.rows_total or rows is not None


@pytest.mark.parametrize("scale", [0.0, 0.97, 2.0])
def test_another_scale_is_found(merge: Merge, scale: float) -> None:
    found = merge.verify(LoraInput("l", merge.lora.path, scale), rows=2)
    assert found.problem_count == 6
    assert "are not base + delta rounded once" in found.problems[0]


def test_an_ignored_alpha_is_found(tmp_path: Path, merge: Merge) -> None:
    no_alpha = tiny.write_lora(tmp_path / "n.safetensors", tiny.lora_tensors(alpha=None))
    assert not merge.verify(LoraInput("l", no_alpha, 1.0), rows=2).passed


def test_one_value_off_by_one_step_is_found(merge: Merge) -> None:
    merge.change("transformer_blocks.0.attn.to_q.weight", 2.0**-9)
    found = merge.verify()
    assert [text.split(":")[0] for text in found.problems] == ["transformer_blocks.0.attn.to_q.weight"]


def test_a_header_whose_entries_are_null_has_none(merge: Merge) -> None:
    path = merge.out / SHARD
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps({**json.loads(content[8:start]), "__metadata__": None}).encode()
    path.unlink()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])
    (problem,) = merge.verify(rows=1).problems
    assert "its header says format None, the base's 'pt'" in problem


def test_a_changed_tensor_that_is_no_target_is_found(merge: Merge) -> None:
    names = load_file(merge.out / SHARD).keys()
    name = next(name for name in names if name.endswith(".bias"))
    merge.change(name, 1.0)
    assert merge.verify(rows=1).problems == [f"{name} is no target of any LoRA and differs from the base"]


@pytest.mark.parametrize("change", [lambda held: held.view(np.float16), lambda held: held.reshape(4, -1)])
def test_the_same_bytes_as_something_else_are_found(
    merge: Merge, change: Callable[[npt.NDArray[np.generic]], npt.NDArray[np.generic]]
) -> None:
    tensors = load_file(merge.out / SHARD)
    name = next(name for name in tensors if name.endswith(".bias"))
    merge.write({**tensors, name: change(tensors[name])})
    assert merge.verify(rows=1).problems == [f"{name} is no target of any LoRA and differs from the base"]


@pytest.mark.parametrize(("block", "piece"), [(1, 1 << 20), (16, 24), (1 << 20, 8), (1 << 20, 1 << 20)])
def test_a_change_in_the_last_piece_is_found(
    merge: Merge, block: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_comparison, "BLOCK", block)
    monkeypatch.setattr(byte_comparison, "PIECE", piece)
    assert merge.verify(rows=1).passed
    tensors = load_file(merge.out / SHARD)
    name = next(name for name in tensors if name.endswith(".bias"))
    tensors[name] = tensors[name].copy()
    tensors[name][-1] += 1
    merge.write(tensors)
    config = merge.out / "vae/config.json"
    content = config.read_bytes()
    config.unlink()
    config.write_bytes(content[:-1] + b" ")
    assert merge.verify(rows=1).problems == [
        f"{name} is no target of any LoRA and differs from the base",
        "vae/config.json differs from the base's",
    ]


def test_the_result_is_the_same_of_links_and_of_copies(merge: Merge) -> None:
    linked = merge.verify()
    for path in merge.out.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
    assert merge.verify() == linked


def test_a_file_that_ends_while_it_is_read_is_refused(merge: Merge) -> None:
    opened = Weights([merge.out / SHARD])
    os.truncate(merge.out / SHARD, (merge.out / SHARD).stat().st_size - 1)
    last = max(map(opened.__getitem__, opened.names()), key=lambda tensor: tensor.start)
    with pytest.raises(BadCheckpoint, match="ends before its last tensor does"):
        last.read()


def test_a_module_left_out_is_found(tmp_path: Path, merge: Merge) -> None:
    part = {key: value for key, value in tiny.lora_tensors().items() if "blocks.1" not in key}
    smaller = LoraInput("l", tiny.write_lora(tmp_path / "part.safetensors", part), 1.0)
    assert merge.verify(smaller, rows=1).problem_count == 3


def test_a_key_that_the_base_lacks_is_found(tmp_path: Path, merge: Merge) -> None:
    extra = {"transformer_blocks.9.x.lora_down.weight": np.ones((1, 1), np.float32)}
    more = LoraInput("l", tiny.write_lora(tmp_path / "more.safetensors", {**tiny.lora_tensors(), **extra}), 1.0)
    found = merge.verify(more, rows=1)
    assert found.modules == 7
    assert "has no weight in the base" in found.problems[0]


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("scheduler/scheduler_config.json", {"shift_terminal": 0.02, "base_shift": 1.0}, "shift_terminal is 0.02"),
        ("model_index.json", {"_class_name": "QwenImageEditPipeline"}, '_class_name is "QwenImageEditPipeline"'),
        ("vae/config.json", {"changed": 1}, "differs from the base's"),
        ("vae/new.json", {}, "is not in the base"),
    ],
)
def test_a_wrong_file_is_found(merge: Merge, file: str, content: object, problem: str) -> None:
    (merge.out / file).unlink(missing_ok=True)
    (merge.out / file).write_text(json.dumps(content))
    assert any(problem in text for text in merge.verify(rows=1).problems)


def test_nearest_accepts_ties_and_nothing_further() -> None:
    values = np.array([1.0, 1.0, 1.0], dtype=tiny.BF16)  # the next number is 1 + 2**-7
    exact = np.array([1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 1 - 2.0**-9 - 2.0**-20])
    assert is_nearest(values, exact).tolist() == [True, False, False]


def test_every_bfloat16_is_wide_and_has_neighbours_as_by_the_library_that_knows_it() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(tiny.BF16)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        right = every.astype(np.float64)
        np.testing.assert_array_equal(widen(every), right)
        numbers = every[np.isfinite(right)]
        for side, values in zip((-np.inf, np.inf), neighbours(numbers), strict=True):
            np.testing.assert_array_equal(values, np.nextafter(numbers, tiny.BF16.type(side)).astype(np.float64))


class Rows:
    """A weight of 64 rows, and merges that are right in some rows only."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(1)
        self.folder = folder
        self.weight = rng.standard_normal((64, 8)).astype(np.float32)
        self.parts = {"x.lora_A.weight": rng.standard_normal((2, 8)), "x.lora_B.weight": rng.standard_normal((64, 2))}
        self.base = tiny.write_component(folder / "base", {"x.weight": self.weight}, 1)
        self.lora = tiny.write_lora(folder / "l.safetensors", self.parts)

    def merge(self, wrong: npt.NDArray[np.int64]) -> None:
        right = (self.weight + self.parts["x.lora_B.weight"] @ self.parts["x.lora_A.weight"]).astype(np.float32)
        right[wrong] = self.weight[wrong]
        tiny.write_component(self.folder / "out", {"x.weight": right}, 1)

    def verify(self, rows: int | None = 8, seed: int | None = None) -> Verification:
        given = [LoraInput("l", self.lora, 1.0)]
        return verify_merge(
            self.folder / "out", self.base, given, component="", rows=rows, expected=Expectation(), seed=seed
        )


def test_wrong_rows_are_found_beyond_those_that_an_engine_can_know(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    (known,) = row_blocks("x.weight", 64, 8)
    rows.merge(np.setdiff1d(np.arange(64), known))
    found = rows.verify()
    assert found.problem_count == 1
    assert found.drawn is not None
    assert found.drawn.rows == 8


def test_the_rows_that_are_drawn_are_others_in_every_run_and_a_seed_draws_them_again(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    (known,) = row_blocks("x.weight", 64, 8)
    rows.merge(np.setdiff1d(np.arange(64), known)[:1])  # one wrong row
    runs = [rows.verify(seed=seed) for seed in range(40)]
    assert {run.passed for run in runs} == {True, False}
    assert [rows.verify(seed=seed).passed for seed in range(40)] == [run.passed for run in runs]
    drawn = [run.drawn.seed for run in (rows.verify(), rows.verify()) if run.drawn]
    assert len(set(drawn)) == 2
    assert not rows.verify(rows=None).passed
    assert rows.verify(rows=None).drawn is None


def test_what_is_measured_does_not_depend_on_the_seed(tmp_path: Path) -> None:
    """Two right builds have one `verify.json`."""
    rows = Rows(tmp_path)
    rows.merge(np.array([], int))
    found = [rows.verify(seed=seed) for seed in (1, 2)]
    for each in found:
        each.drawn = None
    assert found[0] == found[1]


def one_weight(folder: Path, size: float, dtype: npt.DTypeLike, rank: int = 4) -> tuple[Path, Path, LoraInput]:
    """A base of two weights of 1 / 50 and a LoRA that changes them by a share of that, merged."""
    rng = np.random.default_rng(4)
    base: dict[str, npt.NDArray[np.generic]] = {}
    lora: dict[str, npt.NDArray[np.generic]] = {}
    for name, times in (("a", 1.0), ("b", 3.0)):
        base[f"{name}.weight"] = (rng.standard_normal((200, 64)) / 50).astype(dtype)
        lora[f"{name}.lora_up.weight"] = rng.standard_normal((200, rank)).astype(np.float32)
        down = rng.standard_normal((rank, 64)) * size * times / 50 / np.sqrt(rank)
        lora[f"{name}.lora_down.weight"] = down.astype(np.float32)
    save_file(base, folder / "base.safetensors")
    save_file(lora, folder / "l.safetensors")
    given = LoraInput("l", folder / "l.safetensors", 1.0)
    plan = make_plan(open_checkpoint(folder / "base.safetensors"), [given])
    out = folder / "out.safetensors"
    write_merged(plan, out, device="cpu", generated={}, known={}, progress=lambda _: None)
    return folder / "base.safetensors", out, given


# By the change as a share of the weights: the dtype, and the cosine that is left of it.
KEPT = [(0.05, tiny.BF16, 0.999, 1.0), (0.001, tiny.BF16, 0.8, 0.9), (0.001, np.float32, 0.999999, 1.0)]


@pytest.mark.parametrize(("size", "dtype", "least", "most"), KEPT)
def test_what_rounding_left_of_the_change_is_measured(
    tmp_path: Path, size: float, dtype: npt.DTypeLike, least: float, most: float
) -> None:
    base, out, lora = one_weight(tmp_path, size, dtype)
    found = verify_merge(out, base, [lora], component="", rows=None, expected=Expectation())
    assert found.passed
    parts: list[list[float]] = []
    for name in ("a", "b"):
        weight, stored = (widen(load_file(path)[f"{name}.weight"]) for path in (base, out))
        up, down = (load_file(lora.path)[f"{name}.lora_{side}.weight"].astype(np.float64) for side in ("up", "down"))
        meant = up @ down
        written = stored - weight
        parts.append([(meant * written).sum(), (meant**2).sum(), (written**2).sum(), ((written - meant) ** 2).sum()])
        change = found.changes[f"{name}.weight"]
        together, of_meant, of_written, off = parts[-1]
        assert change.cosine == pytest.approx(together / np.sqrt(of_meant * of_written), rel=1e-8)
        assert change.noise == pytest.approx(off / of_meant, rel=1e-4)
    together, of_meant, of_written, off = np.sum(parts, axis=0)
    assert found.update.cosine == pytest.approx(together / np.sqrt(of_meant * of_written), rel=1e-8)
    assert found.update.noise == pytest.approx(off / of_meant, rel=1e-4)
    assert found.update.cosine is not None
    assert least < found.update.cosine <= most
    estimated = verify_merge(out, base, [lora], component="", rows=40, expected=Expectation()).update
    assert estimated.cosine == pytest.approx(found.update.cosine, rel=0.1)
    assert bool(found.warnings) == (most < 0.95)
    for warning in found.warnings:
        assert "2 of 2 targets keep little" in warning
        assert "a.weight has" in warning
        assert "--dtype float32" in warning


def test_the_change_of_all_targets_counts_every_row_of_each(tmp_path: Path) -> None:
    """Of a large weight as many rows are looked at as of a small one, and they stand for more."""
    base, out, lora = one_weight(tmp_path, 0.01, tiny.BF16)
    rows = [verify_merge(out, base, [lora], component="", rows=n, expected=Expectation()) for n in (16, None)]
    few, everything = (found.update.noise for found in rows)
    assert few == pytest.approx(everything, rel=0.2)
    assert all(found.changes["a.weight"].noise > 5 * found.changes["b.weight"].noise for found in rows)  # type: ignore[operator]


def test_a_target_to_which_nothing_is_added_has_no_cosine(tmp_path: Path) -> None:
    base, out, lora = one_weight(tmp_path, 0.0, tiny.BF16)
    found = verify_merge(out, base, [lora], component="", rows=4, expected=Expectation())
    assert (found.update.cosine, found.update.noise, found.warnings) == (None, None, [])


def test_the_command_line_names_the_seed_and_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Rows(tmp_path)
    rows.merge(np.array([], int))
    command = ["verify", str(tmp_path / "out"), str(rows.base), "--lora", str(rows.lora), "--rows", "8"]
    assert main(command) == 0
    assert "8 rows drawn at random; --seed " in capsys.readouterr().out
    assert main([*command, "--seed", "7"]) == 0
    assert "; --seed 7 draws them again" in capsys.readouterr().out


def test_a_lora_that_does_not_fit_is_a_problem_and_no_traceback(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    rows.merge(np.array([], int))
    tiny.write_lora(rows.lora, {**rows.parts, "x.lora_B.weight": np.ones((5, 2))})
    assert "does not fit" in rows.verify().problems[0]
    for more in ({"x.lora_B.weight": np.ones((65, 2))}, {"x.dora_scale": np.ones((65, 1))}):
        tiny.write_lora(rows.lora, {**rows.parts, **more})
        assert "does not fit" in rows.verify().problems[0]
    rows.lora.write_bytes(b"x")
    with pytest.raises(BadLora, match="cannot be opened"):
        rows.verify()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e8m0fnu", "complex64"])
def test_tensors_of_dtypes_that_numpy_has_no_name_for_are_compared_byte_by_byte(tmp_path: Path, dtype: str) -> None:
    lora = tiny.write_lora(
        tmp_path / "l.safetensors", {"x.lora_A.weight": np.ones((1, 4)), "x.lora_B.weight": np.ones((8, 1))}
    )
    other = torch.arange(64, dtype=torch.uint8).view(getattr(torch, dtype))
    files = {name: tmp_path / f"{name}.safetensors" for name in ("base", "right", "wrong")}
    changed = other.view(torch.uint8).clone()
    changed[63] = 0
    for name, path in files.items():
        kept = changed.view(other.dtype) if name == "wrong" else other
        torch_save({"x.weight": torch.full((8, 4), 1.0 + (name != "base")), "other": kept}, path)

    def verify(name: str) -> list[str]:
        given = [LoraInput("l", lora, 1.0)]
        return verify_merge(files[name], files["base"], given, component="", rows=None, expected=Expectation()).problems

    assert verify("right") == []
    assert verify("wrong") == ["other is no target of any LoRA and differs from the base"]


@pytest.mark.parametrize("dtype", ["float64", "float16", "float8_e4m3fn"])
def test_a_target_of_another_dtype_is_found(tmp_path: Path, dtype: str) -> None:
    rows = Rows(tmp_path)
    rows.merge(np.array([], int))
    path = tmp_path / "out/diffusion_pytorch_model.safetensors"
    weight = torch.from_numpy(load_file(path)["x.weight"]).to(getattr(torch, dtype))
    torch_save({"x.weight": weight}, path, metadata={"format": "pt"})
    (problem,) = rows.verify().problems
    assert problem.startswith("x.weight is F")
    assert "the base's F32" in problem


@pytest.mark.parametrize("beside", ["scale_weight", "weight_scale_inv", "weight.absmax"])
def test_a_weight_that_a_scale_goes_with_is_no_weight_to_add_to(tmp_path: Path, beside: str) -> None:
    rows = Rows(tmp_path)
    rows.merge(np.array([], int))
    for folder in ("base", "out"):
        path = tmp_path / folder / "diffusion_pytorch_model.safetensors"
        save_file({**load_file(path), f"x.{beside}": np.ones(1, np.float32)}, path, metadata={"format": "pt"})
    (problem,) = rows.verify().problems
    assert problem.startswith(f"x.weight is no plain weight in the base: x.{beside} goes with it")
