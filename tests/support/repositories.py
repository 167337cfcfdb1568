"""A base and a LoRA as a repository of the Hub has them, by path."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from lora_fuse.errors import BadSource, Refused
from lora_fuse.hub.locks import lock_base
from lora_fuse.machine.files import FileRecord
from lora_fuse.recipe.records import Lock
from tests.support.tiny import on_hub

BASE, LORA = "bob/base", "bob/lora"
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens
LORA_FILE = "4steps/lora.safetensors"


def weights(seed: int) -> bytes:
    numbers = np.random.default_rng(seed).standard_normal((8, 8), dtype=np.float32)
    return bytes(save({"weight": numbers}))


def text(content: object) -> bytes:
    return json.dumps(content).encode()


SHARDS = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}

PIPELINE: dict[str, bytes] = {
    "model_index.json": text(
        {
            "_class_name": "QwenImagePipeline",
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "QwenImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLQwenImage"],
        }
    ),
    "scheduler/scheduler_config.json": text({"shift": 1.0}),
    "tokenizer/chat_template.jinja": b"{{ messages }}",
    "tokenizer/merges.txt": b"a b\n",
    "tokenizer/vocab.json": text({"a": 0}),
    "transformer/config.json": text({"num_layers": 1}),
    "transformer/model-1-of-2.safetensors": weights(1),
    "transformer/model-2-of-2.safetensors": weights(2),
    "transformer/model.safetensors.index.json": text({"metadata": {}, "weight_map": SHARDS}),
    "vae/config.json": text({}),
    "vae/model.safetensors": weights(3),
}

STRAYS: dict[str, bytes] = {
    ".env": b"SECRET=1",
    "README.md": b"# base",
    "all-in-one.safetensors": weights(4),
    "pipeline.py": b"import os",
    "safety_checker/model.safetensors": weights(5),
    "transformer/diffusion_pytorch_model.bin": b"pickle",
    "vae/model.fp16.safetensors": weights(6),
    "vae/model.onnx": b"onnx",
    "vae/sub/model.ckpt": b"pickle",
}


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def records(files: dict[str, bytes]) -> dict[str, FileRecord]:
    return {name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(files.items())}


def lock(previous: Lock | None = None, revision: str = "main", *, offline: bool = False) -> Lock:
    return lock_base(on_hub(BASE, revision), previous=previous, offline=offline)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def refusal(work: Callable[[], object], *words: str, kind: type[Refused] = BadSource) -> str:
    """Return the one line that the work is refused with, which says all these words."""
    with pytest.raises(kind) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
    return message
