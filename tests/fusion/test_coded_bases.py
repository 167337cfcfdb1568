"""Bases whose weights are codes: what is merged is the sum of what the codes stand for, rounded once."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig, QwenImageTransformer2DModel
from safetensors.numpy import load_file, save_file

from lora_fuse import LoraInput, verify
from lora_fuse.checkpoint import Checkpoint, open_checkpoint
from lora_fuse.checkpoint.stored import decode_rows
from lora_fuse.cli import main
from lora_fuse.errors import BadCheckpoint, BadConfig, Refused
from lora_fuse.fusion import FuseJob, read_manifest
from lora_fuse.fusion.merge import write_merged
from lora_fuse.fusion.plan import make_plan
from lora_fuse.machine import FileRecord, files
from lora_fuse.verification.coded_weights import open_weights, read_codes
from tests.support import codes, tiny

SCALE = 0.7
PREFIX = "model.diffusion_model."


@pytest.fixture
def lora(tmp_path: Path) -> LoraInput:
    return LoraInput("l", tiny.write_lora(tmp_path / "l.safetensors", codes.lora()), SCALE)


def fuse(base: Path, out: Path, lora: LoraInput, *, requantise: bool = False, force: bool = False) -> Path:
    plan = make_plan(open_checkpoint(base), [lora], requantise=requantise)
    FuseJob(plan, out, device="cpu", force_quantised=force).run()
    return out


def problems(out: Path, base: Path, lora: LoraInput) -> list[str]:
    return verify(out, base, [lora], rows="all").problems


@pytest.mark.parametrize("kind", [*codes.SAFETENSORS, *codes.GGUF])
def test_what_codes_stand_for_is_added_to_and_rounded_once(tmp_path: Path, lora: LoraInput, kind: str) -> None:
    base = codes.write(kind, tmp_path)
    merged = load_file(fuse(base.path, tmp_path / "o.safetensors", lora))
    assert merged.keys() == {f"{module}.weight" for module in base.values} | {f"{codes.MODULES[0]}.bias"}
    for module in codes.MODULES:
        exact = codes.merged(base.values[module], module, codes.lora(), SCALE)
        written = exact.astype(np.float16) if kind == "F16" else codes.to_bfloat16(exact)
        np.testing.assert_array_equal(merged[f"{module}.weight"], written)
    left = base.values[codes.LEFT].astype(written.dtype)
    np.testing.assert_array_equal(merged[f"{codes.LEFT}.weight"], left)
    assert problems(tmp_path / "o.safetensors", base.path, lora) == []
    (words,) = (read_manifest(tmp_path / "o.safetensors.manifest.json")[0].source or {}).keys()
    assert words.split(",")[0] in kind or words.startswith(("float8_e4m3fn", "of GGUF"))


def test_names_may_have_comfyui_s_prefix_and_keep_it(tmp_path: Path, lora: LoraInput) -> None:
    plain = load_file(fuse(codes.write("scaled_fp8", tmp_path).path, tmp_path / "bare.safetensors", lora))
    base = codes.write("scaled_fp8", tmp_path, PREFIX).path
    merged = load_file(fuse(base, tmp_path / "o.safetensors", lora))
    assert {name: tensor.tobytes() for name, tensor in merged.items()} == {
        f"{PREFIX}{name}": tensor.tobytes() for name, tensor in plain.items()
    }
    assert problems(tmp_path / "o.safetensors", base, lora) == []


def test_plain_weights_with_the_prefix_are_fused_as_without(tmp_path: Path, lora: LoraInput) -> None:
    tensors = {f"{module}.weight": matrix.astype(tiny.BF16) for module, matrix in codes.weights().items()}
    save_file(tensors, tmp_path / "bare.safetensors")
    save_file({f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}, tmp_path / "named.safetensors")
    bare, named = (
        load_file(fuse(tmp_path / f"{name}.safetensors", tmp_path / f"{name}-out.safetensors", lora))
        for name in ("bare", "named")
    )
    assert [tensor.tobytes() for tensor in named.values()] == [tensor.tobytes() for tensor in bare.values()]
    assert problems(tmp_path / "named-out.safetensors", tmp_path / "named.safetensors", lora) == []


def test_a_folder_of_shards_gets_the_index_of_what_is_left(tmp_path: Path, lora: LoraInput) -> None:
    """The scale of one weight lies in another shard, as where files are cut by size."""
    base = tiny.write_component(tmp_path / "base", codes.tensors("scaled_fp8")[0], shards=2)
    out = fuse(base, tmp_path / "out", lora)
    index = json.loads((out / "diffusion_pytorch_model.safetensors.index.json").read_text())
    merged = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert index["weight_map"].keys() == merged.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())
    one = load_file(fuse(codes.write("scaled_fp8", tmp_path).path, tmp_path / "o.safetensors", lora))
    assert {name: tensor.tobytes() for name, tensor in merged.items()} == {
        name: tensor.tobytes() for name, tensor in one.items()
    }
    assert problems(out, base, lora) == []
    index["metadata"]["total_size"] += 1
    (out / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert len(problems(out, base, lora)) == 1


@pytest.mark.parametrize("requantise", [False, True])
def test_codes_that_are_not_what_was_locked_are_refused_as_they_stream(
    tmp_path: Path, lora: LoraInput, requantise: bool
) -> None:
    base = tiny.write_component(tmp_path / "base", codes.tensors("scaled_fp8")[0], shards=2)
    locked = {path.name: FileRecord(path.stat().st_size, files.hash_file(path).sha256) for path in base.iterdir()}
    plan = make_plan(open_checkpoint(base), [lora], requantise=requantise)

    def write() -> None:
        how = {"device": "cpu", "generated": {}, "progress": lambda _: None, "hash_inputs": True}
        write_merged(plan, tmp_path / "out", known=locked, **how)  # type: ignore[arg-type]

    changed = sorted(base.glob("*.safetensors"))[-1]
    was = locked[changed.name]
    locked[changed.name] = FileRecord(was.size, was.sha256[::-1])
    said = rf"{changed.name} is not what was locked.*{was.sha256}.*{was.sha256[::-1]}"
    with pytest.raises(BadCheckpoint, match=said):
        write()
    assert not (tmp_path / "out").exists()
    locked[changed.name] = was
    write()
    assert (tmp_path / "out").is_dir()


def test_the_bytes_are_the_same_for_any_threads_and_pieces(
    tmp_path: Path, lora: LoraInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = codes.write("int8_tensorwise convrot 256", tmp_path).path
    first = hashlib.sha256(fuse(base, tmp_path / "a.safetensors", lora).read_bytes()).hexdigest()
    monkeypatch.setattr("lora_fuse.fusion.pieces.PIECE", 700)
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    again = fuse(base, tmp_path / "b.safetensors", lora).read_bytes()
    assert hashlib.sha256(again).hexdigest() == first


def added_to_codes(tensors: dict[str, tiny.Array]) -> None:
    """A merge by who adds to what the file holds: the update, and then the scale a second time."""
    name = f"{codes.MODULES[0]}.weight"
    update = codes.merged(np.zeros((24, 256), np.float32), codes.MODULES[0], codes.lora(), SCALE)
    base = tensors[name].astype(np.float64) - update
    tensors[name] = (base + update * 0.002).astype(tiny.BF16)


def without_scale(tensors: dict[str, tiny.Array]) -> None:
    tensors[f"{codes.LEFT}.weight"] = (tensors[f"{codes.LEFT}.weight"].astype(np.float32) * 2).astype(tiny.BF16)


@pytest.mark.parametrize("wrong", [added_to_codes, without_scale])
def test_a_wrong_merge_is_caught(
    tmp_path: Path, lora: LoraInput, wrong: Callable[[dict[str, tiny.Array]], None]
) -> None:
    base = codes.write("scaled_fp8", tmp_path).path
    out = fuse(base, tmp_path / "o.safetensors", lora)
    tensors = load_file(out)
    wrong(tensors)
    save_file(tensors, out)
    assert len(problems(out, base, lora)) == 1


def saved(tmp_path: Path, kind: str, **changes: tiny.Array | None) -> Path:
    """A base of which tensors beside the first module's weight are others, or are not there."""
    tensors, _ = codes.tensors(kind)
    for suffix, tensor in changes.items():
        name = f"{codes.MODULES[0]}.{suffix}"
        tensors.pop(name, None)
        tensors |= {} if tensor is None else {name: tensor}
    save_file(tensors, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def text(said: str) -> tiny.Array:
    return np.frombuffer(said.encode(), np.uint8)


F32 = np.float32
BAD: dict[str, tuple[str, dict[str, tiny.Array | None], str]] = {
    "no scale": ("scaled_fp8", {"scale_weight": None}, "with a scale, and beside it is no weight_scale"),
    "two scales": ("scaled_fp8", {"weight_scale": np.ones((), F32)}, "weight_scale and scale_weight"),
    "NaN": ("scaled_fp8", {"scale_weight": np.array(np.nan, F32)}, "holds nan, which is no scale"),
    "negative": ("scaled_fp8", {"scale_weight": np.array(-1, F32)}, "holds -1.0, which is no scale"),
    "of columns": ("float8 by row", {"weight_scale": np.ones(256, F32)}, r"F32 \[256\], and the scale"),
    "in bf16": ("scaled_fp8", {"scale_weight": np.ones((), tiny.BF16)}, "is BF16"),
    "another format": ("int8_tensorwise", {"comfy_quant": text('{"format": "nvfp5"}')}, "format 'nvfp5'; known are"),
    "no format": ("int8_tensorwise", {"comfy_quant": text("{}")}, "no format in it"),
    "no JSON": ("int8_tensorwise", {"comfy_quant": text("int8")}, "no text of JSON"),
    "of other codes": ("int8_tensorwise", {"comfy_quant": text('{"format": "float8_e4m3fn"}')}, "the weight is I8"),
    "nothing said of int8": ("int8_tensorwise", {"comfy_quant": None}, "scaled fp8, fp4 or int8"),
    "a group of 8": (
        "int8_tensorwise",
        {"comfy_quant": text('{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 8}')},
        "convrot in groups of 8",
    ),
    "a second scale": ("float8 by row", {"weight_scale_2": np.ones((), F32)}, "weight_scale_2"),
    "smoothed": ("int8_tensorwise", {"smooth_factor": np.ones(256, F32)}, "nunchaku"),
}


@pytest.mark.parametrize("why", BAD)
def test_what_is_not_said_is_not_guessed(tmp_path: Path, lora: LoraInput, why: str) -> None:
    kind, changes, words = BAD[why]
    with pytest.raises(BadCheckpoint, match=words):
        make_plan(open_checkpoint(saved(tmp_path, kind, **changes)), [lora])


def test_a_code_that_is_no_number_ends_the_fuse_with_nothing_written(tmp_path: Path, lora: LoraInput) -> None:
    tensors, _ = codes.tensors("scaled_fp8")
    broken = tensors[f"{codes.LEFT}.weight"].view(np.uint8).copy()
    broken[3, 5] = 0x7F
    path = tmp_path / "base.safetensors"
    save_file({**tensors, f"{codes.LEFT}.weight": broken.view(codes.E4M3)}, path)
    with pytest.raises(BadCheckpoint, match=f"{codes.LEFT}.weight.*stand for NaN"):
        fuse(path, tmp_path / "o.safetensors", lora)
    assert not (tmp_path / "o.safetensors").exists()


def opened(data: bytes, path: Path) -> Checkpoint:
    path.write_bytes(data)
    return open_checkpoint(path)


def test_a_gguf_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    whole = codes.write("Q8_0", tmp_path).path.read_bytes()
    path = tmp_path / "broken.gguf"
    assert len(opened(whole, path).tensors()) == 4
    for cut in (len(whole) - 40, 400, 30, 8):
        with pytest.raises(BadCheckpoint, match=r"is no whole GGUF file: .*fetch it again"):
            opened(whole[:cut], path)
    with pytest.raises(BadCheckpoint, match="GGUF of version 1"):
        opened(whole[:4] + struct.pack("<I", 1) + whole[8:], path)
    with pytest.raises(BadCheckpoint, match=r"tensors or entries, and at most"):
        opened(whole[:8] + struct.pack("<Q", 1 << 60) + whole[16:], path)
    name = f"{codes.MODULES[0]}.weight".encode()
    dimension = whole.index(name) + len(name) + 4
    with pytest.raises(BadCheckpoint, match="32 values make a block"):
        opened(whole[:dimension] + struct.pack("<Q", 250) + whole[dimension + 8 :], path)
    kind = dimension + 16
    with pytest.raises(BadCheckpoint, match="ggml's type 99"):
        opened(whole[:kind] + struct.pack("<I", 99) + whole[kind + 4 :], path)


def entry(name: str, kind: int, value: bytes) -> bytes:
    """An entry of GGUF's header."""
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def listed(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


SHAPE_OF = f"comfy.gguf.orig_shape.{codes.MODULES[0]}.weight"
HOSTILE = {
    "more values than a disk has": ([entry("a", 9, listed(0, 1 << 60))], "its header ends"),
    "an entry twice": ([entry("a", 0, b"1"), entry("a", 0, b"2")], "'a' stands in it twice"),
    "a shape below zero": ([entry(SHAPE_OF, 9, listed(5, 2, struct.pack("<ii", -24, -256)))], "originally"),
    "a shape of fractions": ([entry(SHAPE_OF, 9, listed(6, 2, struct.pack("<ff", 24, 256)))], "originally"),
}


@pytest.mark.parametrize("why", HOSTILE)
def test_a_hostile_header_of_gguf_is_refused_by_both_readers(tmp_path: Path, why: str) -> None:
    """Gguf's own reader, which verifies, believes every length and takes what numbers there are."""
    whole = codes.write("Q8_0", tmp_path).path.read_bytes()
    (count,) = struct.unpack("<Q", whole[16:24])
    entries, words = HOSTILE[why]
    made = whole[:16] + struct.pack("<Q", count + len(entries)) + b"".join(entries) + whole[24:]
    with pytest.raises(BadCheckpoint, match=words):
        opened(made, tmp_path / "hostile.gguf")
    with pytest.raises(BadCheckpoint, match=words):
        open_weights([tmp_path / "hostile.gguf"])


LAYERS = ("{", "[]", '{"layers": [1]}', "[" * 90_000)


@pytest.mark.parametrize("text", LAYERS, ids=lambda text: text[:20])
def test_a_list_of_layers_that_cannot_be_read_is_refused_by_both_readers(
    tmp_path: Path, lora: LoraInput, text: str
) -> None:
    path = tmp_path / "base.safetensors"
    save_file(codes.tensors("int8_tensorwise")[0], path, metadata={"_quantization_metadata": text})
    with pytest.raises(BadCheckpoint, match="_quantization_metadata in its header is no JSON with layers"):
        make_plan(open_checkpoint(path), [lora])
    with pytest.raises(BadCheckpoint, match="_quantization_metadata in its header lists no layers"):
        read_codes(open_weights([path]))


@pytest.mark.parametrize("said", ["{", "[" * 90_000, '{"format": "int8_tensorwise", "convrot_groupsize": 1e999}'])
def test_a_mark_that_cannot_be_read_fails_the_verification(tmp_path: Path, said: str) -> None:
    marked = said.replace("}", ', "convrot": true}')
    found = read_codes(open_weights([saved(tmp_path, "int8_tensorwise", comfy_quant=text(marked))]))
    assert f"{codes.MODULES[0]}.weight" in found.problems


def test_a_type_of_gguf_that_is_not_decoded_is_named(tmp_path: Path, lora: LoraInput) -> None:
    whole = bytearray(codes.write("Q6_K", tmp_path).path.read_bytes())
    name = f"{codes.MODULES[0]}.weight".encode()
    kind = whole.index(name) + len(name) + 4 + 16
    whole[kind : kind + 4] = struct.pack("<I", 10)  # smaller blocks
    with pytest.raises(BadCheckpoint, match="quantised as Q2_K, and decoded are Q8_0, Q4_K"):
        make_plan(opened(bytes(whole), tmp_path / "q2.gguf"), [lora])


def test_from_the_command_line(tmp_path: Path, lora: LoraInput, capsys: pytest.CaptureFixture[str]) -> None:
    base = codes.write("Q4_K", tmp_path).path
    given = ["--lora", str(lora.path), "--scale", str(SCALE)]
    assert main(["plan", str(base), *given]) == 0
    assert "3 weights are Q4_K: decoded and written as BF16" in capsys.readouterr().out
    assert main(["fuse", str(base), str(tmp_path / "o.gguf"), *given]) == 2
    assert "OUT" in capsys.readouterr().err
    assert main(["fuse", str(base), str(tmp_path / "o.safetensors"), *given, "--device", "cpu"]) == 0
    assert main(["verify", str(tmp_path / "o.safetensors"), str(base), *given]) == 0


REQUANTISED = [*codes.SAFETENSORS, "Q8_0"]


@pytest.mark.parametrize("kind", REQUANTISED)
def test_only_targets_are_quantised_again_from_the_exact_sum(tmp_path: Path, lora: LoraInput, kind: str) -> None:
    base = codes.write(kind, tmp_path)
    out = fuse(base.path, tmp_path / f"o{base.path.suffix}", lora, requantise=True, force=True)
    before, after = (open_checkpoint(path).tensors() for path in (base.path, out))
    assert {name: (one.dtype, one.shape) for name, one in after.items()} == {
        name: (one.dtype, one.shape) for name, one in before.items()
    }
    stored = open_checkpoint(out).stored().matrices
    data = np.fromfile(out, np.uint8)
    for module in codes.MODULES:
        matrix = stored[f"{module}.weight"]
        decoded = decode_rows(matrix, data[matrix.codes.tensor.start : matrix.codes.tensor.end], 0)
        meant = codes.merged(base.values[module], module, codes.lora(), SCALE)
        quantised = codes.again(kind, meant.astype(np.float32))
        np.testing.assert_allclose(decoded, quantised, atol=1e-6 * float(np.abs(meant).max()))
    for name in before:
        if not name.startswith(tuple(codes.MODULES)):
            places = (before[name], np.fromfile(base.path, np.uint8)), (after[name], data)
            assert len({bytes(held[one.start : one.end]) for one, held in places}) == 1
    assert problems(out, base.path, lora) == []
    cost = read_manifest(out.with_name(f"{out.name}.manifest.json"))[0].requantised
    assert cost is not None
    assert cost.noise_over_change == pytest.approx(verify(out, base.path, [lora], rows="all").update.noise, rel=1e-4)


def test_what_is_lost_in_codes_is_refused_unless_it_is_asked_for(tmp_path: Path) -> None:
    """A LoRA of a tenth of the size: int8 with outliers spread keeps it, float8 does not."""
    small = LoraInput("s", tiny.write_lora(tmp_path / "s.safetensors", codes.lora(size=0.004)), SCALE)
    base = codes.write("scaled_fp8", tmp_path).path
    with pytest.raises(Refused, match=r"of the LoRA is left .*--side-channel.*--force-quantised; nothing"):
        fuse(base, tmp_path / "o.safetensors", small, requantise=True)
    assert not list(tmp_path.glob("o.safetensors*"))
    fuse(base, tmp_path / "o.safetensors", small, requantise=True, force=True)
    fuse(codes.write("int8_tensorwise convrot 256", tmp_path).path, tmp_path / "i.safetensors", small, requantise=True)


def test_a_type_that_is_only_read_is_not_requantised(tmp_path: Path, lora: LoraInput) -> None:
    with pytest.raises(BadConfig, match=r"is Q4_K, which is read here and not made .*--side-channel"):
        fuse(codes.write("Q4_K", tmp_path).path, tmp_path / "o.gguf", lora, requantise=True)


@pytest.mark.parametrize("kind", ["int8_tensorwise by row", "scaled_fp8", "Q8_0"])
def test_an_update_added_to_codes_is_caught(tmp_path: Path, lora: LoraInput, kind: str) -> None:
    """By who adds to what the file holds, and by who leaves the codes as they were."""
    base = codes.write(kind, tmp_path).path
    out = fuse(base, tmp_path / f"o{base.suffix}", lora, requantise=True, force=True)
    place = open_checkpoint(base).tensors()[f"{codes.MODULES[0]}.weight"]
    data = bytearray(out.read_bytes())
    there = open_checkpoint(out).tensors()[place.name]
    data[there.start : there.end] = base.read_bytes()[place.start : place.end]
    out.write_bytes(data)
    (problem,) = problems(out, base, lora)
    assert problem.startswith(f"{place.name}: ")


def kept_beside(base: Path, out: Path, *loras: LoraInput) -> Path:
    FuseJob(make_plan(open_checkpoint(base), loras), out, device="cpu", beside=True).run()
    return out


def test_beside_codes_the_lora_is_kept_as_it_was(tmp_path: Path, lora: LoraInput) -> None:
    base = codes.write("Q4_K", tmp_path).path
    out = kept_beside(base, tmp_path / "out", lora)
    assert (out / base.name).read_bytes() == base.read_bytes()
    ours = load_file(out / "loras" / "l.safetensors")
    for module in codes.MODULES:
        for side, name in (("down", "lora_A"), ("up", "lora_B")):
            there = ours[f"transformer.{module}.{name}.weight"]
            assert there.tobytes() == codes.lora()[f"{module}.lora_{side}.weight"].tobytes()
    given = LoraInput("again", out / "loras" / "l.safetensors", 1.0)
    again = fuse(base, tmp_path / "again.safetensors", given)
    assert load_file(again).keys() == load_file(fuse(base, tmp_path / "first.safetensors", lora)).keys()
    assert problems(again, base, lora) == problems(tmp_path / "first.safetensors", base, given) == []
    assert problems(out, base, lora) == []
    kept_beside(base, out, lora)  # in its own place
    manifest, _ = read_manifest(tmp_path / "out.manifest.json")
    assert {name: file.origin for name, file in manifest.files.items()} == {
        "base.gguf": "base",
        "loras/l.safetensors": "generated",
    }


@pytest.mark.parametrize("what", ["codes", "strength", "more"])
def test_a_wrong_side_channel_is_caught(tmp_path: Path, lora: LoraInput, what: str) -> None:
    base = codes.write("Q8_0", tmp_path).path
    out = kept_beside(base, tmp_path / "out", lora)
    given = lora
    if what == "codes":
        data = bytearray((out / base.name).read_bytes())
        data[-100] ^= 1
        (out / base.name).unlink()
        (out / base.name).write_bytes(data)
    elif what == "strength":
        given = LoraInput("l", lora.path, SCALE + 1e-6)
    else:
        (out / "w.safetensors").write_bytes(b"")
    assert problems(out, base, given)


def test_beside_a_folder_the_rest_is_taken_over(tmp_path: Path, lora: LoraInput) -> None:
    base = tiny.write_pipeline(tmp_path / "base", codes.tensors("scaled_fp8")[0])
    second = LoraInput("l", tiny.write_lora(tmp_path / "m.safetensors", codes.lora(rank=3)), -1.0)
    out = kept_beside(base, tmp_path / "out", lora, second)
    assert sorted(path.name for path in (out / "loras").iterdir()) == ["l-1.safetensors", "l-2.safetensors"]
    assert verify(out, base, [lora, second]).problems == []
    assert verify(out, base, [lora]).problems


def test_what_is_no_product_is_not_kept_beside(tmp_path: Path) -> None:
    whole = {f"{codes.MODULES[0]}.diff": np.ones((24, 256), np.float32)}
    lora = LoraInput("d", tiny.write_lora(tmp_path / "d.safetensors", whole), 1.0)
    with pytest.raises(BadConfig, match=r"are kept products of two matrices.*leave --side-channel out"):
        kept_beside(codes.write("Q8_0", tmp_path).path, tmp_path / "out", lora)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_diffusers_draws_with_codes_and_the_lora_beside_them(tmp_path: Path) -> None:
    """As docs/fuse.md says; and without the LoRA it draws otherwise."""
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": (8, 12, 12)}
    model = QwenImageTransformer2DModel(**sizes, in_channels=32, out_channels=8, joint_attention_dim=64)
    model.save_pretrained(tmp_path / "model")
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    values = codes.write_model(state, tmp_path / "model.gguf")
    linears = {f"transformer_blocks.0.{linear}": None for linear in ("attn.to_q", "img_mlp.net.0.proj")}
    tensors = codes.lora_of({module: state[f"{module}.weight"].shape for module in linears})
    lora = LoraInput("l", tiny.write_lora(tmp_path / "l.safetensors", tensors), SCALE)
    out = kept_beside(tmp_path / "model.gguf", tmp_path / "out", lora)
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    ours = QwenImageTransformer2DModel.from_single_file(
        str(out / "model.gguf"),
        config=str(tmp_path / "model"),
        quantization_config=config,
        torch_dtype=torch.float32,
    )
    ours.load_lora_adapter(out / "loras", weight_name="l.safetensors", prefix="transformer")
    for module in linears:
        meant = codes.merged(values[f"{module}.weight"], module, tensors, SCALE)
        values[f"{module}.weight"] = meant.astype(np.float32)
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in values.items()})
    given = {
        "hidden_states": torch.randn(1, 16, 32),
        "encoder_hidden_states": torch.randn(1, 5, 64),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
    }
    with torch.no_grad():
        wanted = model(**given).sample
        kept = ours(**given).sample
        ours.disable_lora()
        plain = ours(**given).sample
    assert float((kept - wanted).norm() / wanted.norm()) < 1e-4  # 1e-5 was seen
    assert float((plain - wanted).norm() / wanted.norm()) > 1e-3
