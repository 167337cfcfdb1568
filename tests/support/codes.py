"""Small bases whose weights are codes, in every container that is read, with the values that the codes stand for."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tests.support import tiny
from tests.support.tiny import Array

Float32 = npt.NDArray[np.float32]
E4M3 = ml_dtypes.float8_e4m3fn
E5M2 = ml_dtypes.float8_e5m2
LINEARS = {"attn.to_q": (24, 256), "img_mlp.net.2": (40, 512)}
MODULES = [f"transformer_blocks.0.{linear}" for linear in LINEARS]
Q8_0 = gguf.GGMLQuantizationType.Q8_0
LEFT = "time_text_embed.linear_1"  # a module that no LoRA is for
Stored = tuple[dict[str, Array], Float32]  # what lies in the place of a weight, by suffix, and its values


def weights() -> dict[str, Float32]:
    """The weights of the modules, normal numbers of the size that a model's have."""
    rng = np.random.default_rng(3)
    shapes = {**dict(zip(MODULES, LINEARS.values(), strict=True)), LEFT: (16, 256)}
    return {module: (rng.standard_normal(shape) / 16).astype(np.float32) for module, shape in shapes.items()}


def lora(rank: int = 4, size: float = 0.02) -> dict[str, Array]:
    """A LoRA of all modules but one."""
    return lora_of(dict(zip(MODULES, LINEARS.values(), strict=True)), rank, size)


def lora_of(shapes: Mapping[str, tuple[int, ...]], rank: int = 4, size: float = 0.02) -> dict[str, Array]:
    """A LoRA of which rank and alpha are not the same."""
    rng = np.random.default_rng(4)
    made: dict[str, Array] = {}
    for module, (rows, columns) in shapes.items():
        made[f"{module}.lora_down.weight"] = (rng.standard_normal((rank, columns)) * size).astype(np.float32)
        made[f"{module}.lora_up.weight"] = rng.standard_normal((rows, rank)).astype(tiny.BF16)
        made[f"{module}.alpha"] = np.array(2.0, np.float32)
    return made


def merged(values: Float32, module: str, tensors: Mapping[str, Array], scale: float) -> npt.NDArray[np.float64]:
    """Sum of what codes stand for and of the update, before it is rounded."""
    up, down = (tensors[f"{module}.lora_{side}.weight"].astype(np.float64) for side in ("up", "down"))
    return values.astype(np.float64) + up @ down * (float(tensors[f"{module}.alpha"]) / len(down) * scale)


def to_bfloat16(sums: npt.NDArray[np.float64]) -> Array:
    """Float64 rounded once, to nearest: of the two neighbours of a number cut off, the nearer one."""
    down = (sums.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    bits = down.view(np.uint32).astype(np.int64)
    candidates = np.stack([(bits + step).astype(np.uint32).view(np.float32) for step in (-0x10000, 0, 0x10000)])
    nearest = np.abs(candidates.astype(np.float64) - sums).argmin(axis=0)
    return np.asarray(np.take_along_axis(candidates, nearest[None], axis=0)[0].astype(tiny.BF16))


def _scaled(matrix: Float32, largest: float, by_row: bool) -> Float32:
    top = np.abs(matrix).max(axis=1, keepdims=True) if by_row else np.abs(matrix).max()
    return np.asarray(top / np.float32(largest), np.float32)


def _text(**said: object) -> Array:
    return np.frombuffer(json.dumps(said).encode(), np.uint8)


def float8(kind: npt.DTypeLike) -> Callable[[Float32], Stored]:
    def alone(matrix: Float32) -> Stored:
        codes = matrix.astype(kind)
        return {"weight": codes}, codes.astype(np.float32)

    return alone


def scaled_float8(
    kind: npt.DTypeLike, name: str = "weight_scale", by_row: bool = False, said: bool = True
) -> Callable[[Float32], Stored]:
    def scaled(matrix: Float32) -> Stored:
        largest = float(ml_dtypes.finfo(kind).max)
        scale = _scaled(matrix, largest, by_row)
        codes = (matrix / scale).astype(kind)
        parts: dict[str, Array] = {"weight": codes, name: scale}
        if said:
            parts["comfy_quant"] = _text(format=np.dtype(kind).name)
            parts["input_scale"] = np.array(1.0, np.float32)
        return parts, codes.astype(np.float32) * scale

    return scaled


def int8(by_row: bool, group: int = 0, inside: bool = False) -> Callable[[Float32], Stored]:
    def rounded(matrix: Float32) -> Stored:
        turned = _turned(matrix.astype(np.float64), group or 1)
        scale = _scaled(turned.astype(np.float32), 127, by_row)
        codes = np.rint(turned / scale).astype(np.int8)
        settings: dict[str, object] = {"convrot": True, "convrot_groupsize": group} if group else {}
        said = {"params": settings} if inside else settings
        back = (codes.astype(np.float64).reshape(len(codes), -1, group or 1) @ hadamard(group or 1)).reshape(
            codes.shape
        )
        values = (back * scale.astype(np.float64)).astype(np.float32)
        return {"weight": codes, "weight_scale": scale, "comfy_quant": _text(format="int8_tensorwise", **said)}, values

    return rounded


def _turned(matrix: npt.NDArray[np.float64], group: int) -> npt.NDArray[np.float64]:
    return np.asarray(matrix.reshape(len(matrix), -1, group) @ hadamard(group), np.float64).reshape(matrix.shape)


@cache
def hadamard(size: int) -> npt.NDArray[np.float64]:
    """ConvRot's matrix by its definition: the sign of an entry is a product over the digits of its place, in base 4."""
    smallest = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    made = np.ones((size, size))
    for row, column in np.ndindex(size, size):
        rest = size
        i, j = row, column
        while rest > 1:
            made[row, column] *= smallest[i % 4][j % 4]
            i, j, rest = i // 4, j // 4, rest // 4
    return np.asarray(made / np.sqrt(size), np.float64)


SAFETENSORS: Mapping[str, Callable[[Float32], Stored]] = {
    "float8_e4m3fn alone": float8(E4M3),
    "float8_e5m2 alone": float8(E5M2),
    "scaled_fp8": scaled_float8(E4M3, "scale_weight", said=False),
    "comfy_quant float8_e4m3fn": scaled_float8(E4M3),
    "comfy_quant float8_e5m2": scaled_float8(E5M2),
    "float8 by row": scaled_float8(E4M3, by_row=True, said=False),
    "int8_tensorwise": int8(by_row=False),
    "int8_tensorwise by row": int8(by_row=True),
    "int8_tensorwise convrot 256": int8(by_row=True, group=256),
    "int8_tensorwise convrot 16": int8(by_row=True, group=16, inside=True),
}
GGUF = ("Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16")


@dataclass(frozen=True)
class CodedBase:
    """A base of one file, and the values of its weights by module."""

    path: Path
    values: dict[str, Float32]


def tensors(kind: str) -> tuple[dict[str, Array], dict[str, Float32]]:
    """The tensors of a base in a container of `SAFETENSORS`, a bias that is no codes among them; and its weights."""
    made: dict[str, Array] = {f"{MODULES[0]}.bias": np.ones(24, tiny.BF16)}
    values = {}
    for module, matrix in weights().items():
        parts, values[module] = SAFETENSORS[kind](matrix)
        made |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
    if kind == "scaled_fp8":
        made["scaled_fp8"] = np.zeros(0, E4M3)
    return made, values


def write(kind: str, folder: Path, prefix: str = "") -> CodedBase:
    """A base of one file in a container of `SAFETENSORS` or `GGUF`."""
    if kind in GGUF:
        return write_gguf(kind, folder / "base.gguf")
    made, values = tensors(kind)
    save_file({f"{prefix}{name}": tensor for name, tensor in made.items()}, folder / "base.safetensors")
    return CodedBase(folder / "base.safetensors", values)


def again(kind: str, matrix: Float32) -> Float32:
    """The values of a weight that is quantised as a base's of a kind."""
    if kind == "Q8_0":
        return np.asarray(gguf.quants.dequantize(gguf.quants.quantize(matrix, Q8_0), Q8_0), np.float32)
    return SAFETENSORS[kind](matrix)[1]


def write_gguf(kind: str, path: Path) -> CodedBase:
    """A GGUF file by gguf's own writer: Q8_0 by its quantiser, of K types blocks that are drawn."""
    writer = gguf.GGUFWriter(path, "qwen_image")
    qtype = gguf.GGMLQuantizationType[kind]
    values = {}
    for module, matrix in weights().items():
        blocks = _drawn(kind, matrix.shape) if kind.endswith("K") else gguf.quants.quantize(matrix, qtype)
        values[module] = np.asarray(gguf.quants.dequantize(blocks, qtype), np.float32)
        writer.add_tensor(f"{module}.weight", blocks, raw_dtype=qtype)
    writer.add_tensor(f"{MODULES[0]}.bias", np.ones(24, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return CodedBase(path, values)


def write_model(state: Mapping[str, Float32], path: Path) -> dict[str, Float32]:
    """A GGUF file of a model with the matrices of its blocks in Q8_0; the values of all of its tensors."""
    writer = gguf.GGUFWriter(path, "qwen_image")
    values = dict(state)
    for name, tensor in state.items():
        if tensor.ndim == 2 and name.startswith("transformer_blocks."):
            values[name] = again("Q8_0", tensor)
            writer.add_tensor(name, gguf.quants.quantize(tensor, Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(name, tensor)
    writer.add_quantization_version(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _drawn(kind: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Blocks of any codes, with scales of the size that weights need."""
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(sum(shape))
    blocks = rng.integers(0, 256, (shape[0], shape[1] // block, nbytes), np.uint8)
    for at in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]:
        half = rng.uniform(1e-4, 2e-4, blocks.shape[:2]).astype("<f2")
        blocks[..., at : at + 2] = half[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)
