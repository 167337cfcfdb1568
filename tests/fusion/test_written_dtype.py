"""Laws of merges in a dtype of choice: each sum rounded once to it, everything else converted, and all texts say so."""

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file

import lora_fuse
from lora_fuse.checkpoint import dtypes
from lora_fuse.checkpoint.shards import open_checkpoint, read_header
from lora_fuse.cli import main
from lora_fuse.errors import BadCheckpoint, BadConfig
from lora_fuse.fusion.adder import read_deltas
from lora_fuse.fusion.manifest import manifest_path, read_manifest
from lora_fuse.fusion.plan import make_plan
from lora_fuse.lora.deltas import Delta
from lora_fuse.lora.exact import nearest
from lora_fuse.lora.inputs import LoraInput
from tests.support import codes, tiny

STORED = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
OTHERS = ("norm.weight", "scalar", "empty", "steps", "small")


def pipeline(folder: Path, stored: npt.DTypeLike, **more: tiny.Array) -> Path:
    """A base with numbers that no 16 bits hold, and with tensors of every odd shape and kind."""
    rng = np.random.default_rng(1)
    base: dict[str, tiny.Array] = {
        name: (values.astype(np.float64) + 1e-4 * rng.standard_normal(values.shape)).astype(stored)
        for name, values in tiny.weights().items()
    }
    base |= {
        "scalar": np.array(1 / 3, stored),
        "empty": np.zeros((0, 4), stored),
        "wide": np.full((1, 3, 500), 1 / 7, stored),
        "steps": np.arange(5),
        "small": np.arange(60, dtype=np.uint8),
        **more,
    }
    root = tiny.write_pipeline(folder / "base", base)
    config = root / "transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "torch_dtype": "bfloat16"}))
    return root


@pytest.fixture
def lora(tmp_path: Path) -> LoraInput:
    return LoraInput("l", tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors()), 0.7)


def tensors(folder: Path) -> dict[str, tiny.Array]:
    found: dict[str, tiny.Array] = {}
    for path in sorted(folder.rglob("transformer/*.safetensors")):
        found |= load_file(path)
    return found


def verified(out: Path, base: Path, lora: LoraInput, dtype: str | None) -> list[str]:
    return lora_fuse.verify(out, base, [lora], rows="all", dtype=dtype).problems


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("wanted", dtypes.OUTPUTS)
def test_every_float_is_the_exact_one_rounded_once(tmp_path: Path, lora: LoraInput, stored: str, wanted: str) -> None:
    base = pipeline(tmp_path, STORED[stored])
    plan = lora_fuse.plan(base, [lora], dtype=wanted)
    out = tmp_path / "out"
    lora_fuse.fuse(plan, out)
    kind = dtypes.ROUNDABLE[dtypes.OUTPUTS[wanted]]
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys()
    for name, values in before.items():
        if values.dtype not in STORED.values():
            assert (after[name].dtype, after[name].tobytes()) == (values.dtype, values.tobytes())
            continue
        assert (str(after[name].dtype), after[name].shape) == (wanted, values.shape)
        deltas: list[Delta] = read_deltas(plan.targets[name]) if name in plan.targets else []
        if not values.size:
            continue
        flat = values.reshape(len(values) if values.ndim else 1, -1).astype(np.float64)
        for place in np.ndindex(flat.shape):
            exact = sum((delta.exact(*place) for delta in deltas), Fraction(float(flat[place])))
            assert float(after[name].reshape(flat.shape)[place]) == nearest(exact, kind), (name, place)
    assert verified(out, base, lora, wanted) == []
    other = next(name for name in dtypes.OUTPUTS if name != wanted)
    assert verified(out, base, lora, other)
    if stored == dtypes.OUTPUTS[wanted]:
        return
    assert verified(out, base, lora, None)  # without being told
    assert json.loads((out / "transformer/config.json").read_text())["torch_dtype"] == wanted
    index = json.loads(next((out / "transformer").glob("*.index.json")).read_text())
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in after.values())
    assert read_manifest(manifest_path(out))[0].dtype == dtypes.OUTPUTS[wanted]
    for shard in open_checkpoint(out).shards:
        assert json.loads(shard.header.metadata["lora_fuse"])["dtype"] == dtypes.OUTPUTS[wanted]


def test_the_base_s_own_dtype_is_none_that_shows(tmp_path: Path, lora: LoraInput) -> None:
    base = pipeline(tmp_path, tiny.BF16)
    for name, dtype in (("default", None), ("named", "bfloat16")):
        lora_fuse.fuse(lora_fuse.plan(base, [lora], dtype=dtype), tmp_path / name)
    for path in (tmp_path / "default").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "named" / path.relative_to(tmp_path / "default")).read_bytes()
    manifests = [manifest_path(tmp_path / name).read_text() for name in ("default", "named")]
    assert manifests[0] == manifests[1]
    assert "dtype" not in json.loads(manifests[0])


def test_a_single_file_and_a_component_are_written_too(tmp_path: Path, lora: LoraInput) -> None:
    save_file(tiny.weights(), tmp_path / "base.safetensors")
    component = tiny.write_component(tmp_path / "component", tiny.weights(), shards=1)
    for base, out in ((tmp_path / "base.safetensors", tmp_path / "o.safetensors"), (component, tmp_path / "o")):
        lora_fuse.fuse(lora_fuse.plan(base, [lora], dtype="float32"), out)
        assert verified(out, base, lora, "float32") == []
        written = read_header(out if out.is_file() else next(out.glob("*.safetensors")))
        assert {tensor.dtype for tensor in written.tensors.values()} == {"F32"}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("wide", 65520.0, "'wide': a sum is too large for torch.float16: 65520 in row 3, .*largest number is 65504"),
        ("transformer_blocks.0.attn.to_q.weight", 7e4, "to_q.weight': a sum is too large for torch.float16: 699"),
        ("wide", np.nan, "'wide': the base holds NaN or infinity"),
    ],
)
def test_what_float16_has_no_number_for_is_refused(
    tmp_path: Path, lora: LoraInput, name: str, value: float, said: str
) -> None:
    values = np.zeros({"wide": (1, 3, 500)}.get(name, (24, 16)), np.float32)
    values.reshape(-1)[3] = value
    base = pipeline(tmp_path, np.float32, **{name: values})
    out = tmp_path / "out"
    with pytest.raises(BadCheckpoint, match=said) as refused:
        lora_fuse.fuse(lora_fuse.plan(base, [lora], dtype="float16"), out)
    assert str(refused.value).endswith("nothing was written; write bfloat16 or float32 (--dtype, fuse.dtype)")
    assert not out.exists()
    if not np.isnan(value):
        lora_fuse.fuse(lora_fuse.plan(base, [lora], dtype="bfloat16"), out)
        assert verified(out, base, lora, "bfloat16") == []


WRONG: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a value that is not the nearest": ("norm.weight", lambda values: np.nextafter(values, values.dtype.type(2))),
    "a scalar": ("scalar", lambda values: values + values.dtype.type(0.25)),
    "a target rounded twice": (
        "transformer_blocks.0.attn.to_q.weight",
        lambda values: values.astype(ml_dtypes.bfloat16).astype(values.dtype),
    ),
    "an integer": ("steps", lambda values: values + 1),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_conversion_is_found(tmp_path: Path, lora: LoraInput, wrong: str) -> None:
    base = pipeline(tmp_path, np.float32)
    out = tmp_path / "out"
    lora_fuse.fuse(lora_fuse.plan(base, [lora], dtype="float16"), out)
    name, change = WRONG[wrong]
    shard = next(shard for shard in open_checkpoint(out).shards if name in shard.header.tensors)
    held = load_file(shard.path)
    held[name] = np.asarray(change(held[name]))
    shard.path.unlink()
    save_file(held, shard.path, metadata=shard.header.metadata)
    assert name in verified(out, base, lora, "float16")[0]


@pytest.mark.parametrize("file", ["config.json", "diffusion_pytorch_model.safetensors.index.json"])
def test_a_text_that_still_speaks_of_the_base_s_dtype_is_found(tmp_path: Path, lora: LoraInput, file: str) -> None:
    base = pipeline(tmp_path, tiny.BF16)
    out = tmp_path / "out"
    lora_fuse.fuse(lora_fuse.plan(base, [lora], dtype="float32"), out)
    shutil.copy(base / "transformer" / file, out / "transformer" / file)
    (problem,) = verified(out, base, lora, "float32")
    assert problem.startswith(f"{file}: {'torch_dtype' if file == 'config.json' else 'metadata'} is")


def test_another_dtype_is_another_build_and_an_unknown_one_is_refused(tmp_path: Path, lora: LoraInput) -> None:
    checkpoint = open_checkpoint(pipeline(tmp_path, tiny.BF16))
    made = [make_plan(checkpoint, [lora], dtype=dtype).provenance for dtype in (None, "float16", "float32")]
    assert len(set(made)) == 3
    with pytest.raises(BadConfig, match=r"fuse\.dtype.*float8.*float16, bfloat16, float32"):
        make_plan(checkpoint, [lora], dtype="float8")
    with pytest.raises(BadConfig, match="float8"):
        lora_fuse.verify(tmp_path, tmp_path, [lora], dtype="float8")


def test_the_command_line_writes_and_checks_a_dtype(tmp_path: Path, lora: LoraInput) -> None:
    base = str(pipeline(tmp_path, tiny.BF16))
    out = str(tmp_path / "out")
    given = ["--lora", str(lora.path), "--scale", "0.7"]
    assert main(["fuse", base, out, *given, "--dtype", "float32"]) == 0
    assert main(["verify", out, base, *given, "--dtype", "float32"]) == 0
    assert main(["verify", out, base, *given]) == 1
    with pytest.raises(SystemExit):
        main(["fuse", base, out, *given, "--dtype", "int8"])


@pytest.mark.parametrize("kind", ["scaled_fp8", "int8_tensorwise convrot 256", "Q8_0"])
@pytest.mark.parametrize("wanted", ["float32", "float16"])
def test_what_codes_stand_for_is_written_in_it_too(tmp_path: Path, kind: str, wanted: str) -> None:
    base = codes.write(kind, tmp_path)
    lora = LoraInput("l", tiny.write_lora(tmp_path / "l.safetensors", codes.lora()), 0.7)
    out = tmp_path / "o.safetensors"
    lora_fuse.fuse(lora_fuse.plan(base.path, [lora], dtype=wanted), out)
    made = load_file(out)
    assert {str(values.dtype) for values in made.values()} == {wanted}
    for module in codes.MODULES:
        exact = codes.merged(base.values[module], module, codes.lora(), 0.7)
        # a float64 sum is now and then on the other side of a tie of float32
        np.testing.assert_array_max_ulp(made[f"{module}.weight"], exact.astype(wanted), 1 if wanted == "float32" else 0)
    assert verified(out, base.path, lora, wanted) == []
    assert verified(out, base.path, lora, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("wanted", dtypes.OUTPUTS)
def test_a_gpu_writes_the_same_bytes_in_every_dtype(tmp_path: Path, lora: LoraInput, stored: str, wanted: str) -> None:
    plan = lora_fuse.plan(pipeline(tmp_path, STORED[stored]), [lora], dtype=wanted)
    for device in ("cpu", "cuda"):
        lora_fuse.fuse(plan, tmp_path / device, device=device)
    for path in (tmp_path / "cpu").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cuda" / path.relative_to(tmp_path / "cpu")).read_bytes()
