"""Sources that are refused: a base that is not whole, a LoRA that is none or lies outside."""

from pathlib import Path

import pytest

from lora_fuse.errors import BadLora
from lora_fuse.hub.locks import lock_base, lock_lora
from tests.hub_server import LoopbackHub
from tests.support.repositories import BASE, LORA, PIPELINE, refusal, weights, write
from tests.support.tiny import in_folder, on_hub


def test_a_lora_that_is_no_safetensors_file_is_refused_before_anything_is_fetched(hub: LoopbackHub) -> None:
    hub.push(LORA, {"lora.bin": b"pickle", "lora.ckpt": b"pickle", "lora.txt": b"text"})
    for name in ("lora.bin", "lora.ckpt"):
        assert "a pickle" in refusal(lambda name=name: lock_lora(on_hub(LORA), name, previous=None), BadLora)  # type: ignore[misc]
    assert not hub.log
    assert "not safetensors" in refusal(lambda: lock_lora(on_hub(LORA), "lora.txt", previous=None), BadLora)
    assert not hub.calls("/resolve/")


@pytest.mark.parametrize("name", ["../lora.safetensors", "/etc/lora.safetensors", "a/../../lora.safetensors"])
def test_a_lora_outside_its_source_is_refused(tmp_path: Path, name: str) -> None:
    assert "leads out" in refusal(lambda: lock_lora(in_folder(tmp_path), name, previous=None))


NO_WEIGHTS = {name: data for name, data in PIPELINE.items() if not name.endswith((".safetensors", "index.json"))}

ONLY_PICKLES = {
    **{name: data for name, data in PIPELINE.items() if name != "vae/model.safetensors"},
    "vae/model.bin": b"pickle",
}

BROKEN = [
    ({"vae/config.json": b"{}"}, "has no model_index.json"),
    ({**NO_WEIGHTS, "model_index.json": PIPELINE["model_index.json"]}, "has no safetensors weights"),
    (ONLY_PICKLES, "vae/ of SOURCE has weights only as pickles"),
    ({k: v for k, v in PIPELINE.items() if "2-of-2" not in k}, "has no transformer/model-2-of-2.safetensors"),
    ({k: v for k, v in PIPELINE.items() if not k.startswith("tokenizer")}, "has no folder tokenizer/"),
    ({**PIPELINE, "model_index.json": b"{"}, "model_index.json of SOURCE is not JSON"),
    ({**PIPELINE, "vae/second.safetensors": weights(9)}, "vae/ of SOURCE has 2 safetensors files and no index"),
]


@pytest.mark.parametrize(("files", "said"), BROKEN, ids=[said for _, said in BROKEN])
@pytest.mark.parametrize("local", [True, False], ids=["local", "hub"])
def test_a_base_that_is_not_whole_is_refused(
    hub: LoopbackHub, tmp_path: Path, files: dict[str, bytes], said: str, local: bool
) -> None:
    if local:
        source = in_folder(write(tmp_path / "base", files))
        label = str(source.path)
    else:
        label = f"{BASE}@{hub.push(BASE, files).oid}"
        source = on_hub(BASE)
    message = refusal(lambda: lock_base(source, previous=None))
    assert label in message
    assert said.replace("SOURCE", label) in message
    assert not hub.calls("GET /_lfs/"), "weights were fetched of a base that is refused"


def test_a_dangling_link_in_a_local_base_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "base", PIPELINE)
    (root / "vae/model.safetensors").unlink()
    (root / "vae/model.safetensors").symlink_to(tmp_path / "gone")
    message = refusal(lambda: lock_base(in_folder(root), previous=None))
    assert "vae/model.safetensors" in message
    assert "cannot be read" in message
    assert "mend the folder" in message


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(lambda: lock_base(in_folder(tmp_path / "gone"), previous=None))
