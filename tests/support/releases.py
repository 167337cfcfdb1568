"""Keys, and a base and a LoRA of the Hub that can be merged, published and downloaded in a moment."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lora_fuse.cli import main
from tests.hub_server import LoopbackHub
from tests.support import tiny
from tests.support.released import Project

WEIGHTS = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
LORA_FILE = "lightning/l.safetensors"


def private_key(path: Path, key: Any = None, password: bytes | None = None) -> Path:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem = (key or ec.generate_private_key(ec.SECP256R1())).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    path.write_bytes(pem)
    return path


def public_key(private: Path) -> Path:
    key = serialization.load_pem_private_key(private.read_bytes(), None).public_key()
    path = private.with_suffix(".pub")
    path.write_bytes(key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return path


def tiny_base(folder: Path, licence: str | None) -> Path:
    tiny.write_pipeline(folder, tiny.weights())
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer": ["diffusers", "Tiny"], "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vae/diffusion_pytorch_model.bin").unlink()
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n" if licence else "no front matter\n")
    (folder / "transformer/config.json").write_text('{"_class_name": "QwenImageTransformer2DModel"}')
    return folder


def tiny_lora(folder: Path, licence: str | None) -> Path:
    tiny.write_lora(folder / LORA_FILE, tiny.lora_tensors())
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n" if licence else "")
    return folder


def on_the_hub(hub: LoopbackHub, tmp_path: Path, base: str | None, lora: str | None) -> list[str]:
    """Push a base and a LoRA, and the overrides that name them."""
    for repo_id, folder in (
        ("carol/base", tiny_base(tmp_path / "base", base)),
        ("dave/lora", tiny_lora(tmp_path / "lora", lora)),
    ):
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        hub.push(repo_id, files)
        shutil.rmtree(folder)
    return [
        *("base.path=null", "base.repo_id=carol/base", "base.revision=main"),
        *("loras.lightning.path=null", "loras.lightning.repo_id=dave/lora", "loras.lightning.revision=main"),
        f"loras.lightning.filename={LORA_FILE}",
    ]


Build = Callable[..., Project]


def verify(*arguments: object) -> int:
    return main(["verify", *map(str, arguments)])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
