"""Laws of reading exports: every weight comes back under its bare name, from each container."""

import json
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from lora_fuse.errors import BadCheckpoint
from lora_fuse.exports import read_export
from lora_fuse.quantisation import FORMATS, Fp8Options
from tests.support import tiny

WEIGHT = "transformer_blocks.0.attn.to_q.weight"
FLAG = "__index_timestep_zero__"


def weights() -> npt.NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((24, 64), np.float32)


def container(path: Path, name: str, prefix: str = "") -> Path:
    stored = FORMATS[name].encode(weights(), Fp8Options())
    module = WEIGHT.removesuffix(".weight")
    tensors = {f"{prefix}{module}.{suffix}": array for suffix, array in stored.items()}
    tensors[f"{prefix}{module}.bias"] = np.arange(24).astype(tiny.BF16)
    tensors[f"{prefix}{FLAG}"] = np.zeros(0, np.float32)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", sorted({*FORMATS} - {"q8_0"}))
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_container_is_read_as_it_was_written(tmp_path: Path, name: str, prefix: str) -> None:
    read = dict(read_export(container(tmp_path / "x.safetensors", name, prefix), {WEIGHT: (24, 64)}))
    assert read.keys() == {WEIGHT, WEIGHT.replace("weight", "bias")}
    assert all(values.dtype == np.float32 for values in read.values())
    np.testing.assert_array_equal(read[WEIGHT.replace("weight", "bias")], np.arange(24))
    assert np.linalg.norm(read[WEIGHT] - weights()) < 0.1 * np.linalg.norm(weights())


def test_gguf_is_read_as_gguf_py_writes_it(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen_image")
    writer.add_tensor(
        WEIGHT, FORMATS["q8_0"].encode(weights(), Fp8Options())["weight"], raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("a.bias", np.arange(24, dtype=np.float32))
    rows = np.arange(48).astype(tiny.BF16).reshape(3, 16)
    writer.add_tensor("b.weight", rows.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.add_tensor(FLAG, np.zeros(0, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = dict(read_export(tmp_path / "x.gguf"))
    assert read.keys() == {WEIGHT, "a.bias", "b.weight"}
    np.testing.assert_array_equal(read["b.weight"], np.arange(48).reshape(3, 16))
    assert np.linalg.norm(read[WEIGHT] - weights()) < 0.01 * np.linalg.norm(weights())


def test_what_does_not_add_up_is_refused(tmp_path: Path) -> None:
    path = container(tmp_path / "x.safetensors", "int8_convrot")
    with pytest.raises(BadCheckpoint, match=r"to_q.*\[24, 64\].*\[24, 60\]"):
        list(read_export(path, {WEIGHT: (24, 60)}))
    mark = np.frombuffer(json.dumps({"format": "int2"}).encode(), np.uint8)
    save_file(
        {"a.weight": np.zeros((2, 4), np.int8), "a.weight_scale": np.ones(2, np.float32), "a.comfy_quant": mark}, path
    )
    with pytest.raises(BadCheckpoint, match="int2"):
        list(read_export(path))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(BadCheckpoint, match="is GGUF of version 0"):
        list(read_export(tmp_path / "x.gguf"))
