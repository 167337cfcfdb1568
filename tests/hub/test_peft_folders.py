"""PEFT folders: weights and configuration are pinned together."""

from pathlib import Path

import pytest

from lora_fuse.errors import BadLora
from lora_fuse.hub.locks import lock_lora
from lora_fuse.recipe.hf_cache import locate
from tests.hub_server import Fault, LoopbackHub
from tests.support.repositories import LORA, records, refusal, text, weights, write
from tests.support.tiny import in_folder, on_hub

PEFT: dict[str, bytes] = {
    "style/adapter_config.json": text({"peft_type": "LORA", "r": 4, "lora_alpha": 8}),
    "style/adapter_model.safetensors": weights(7),
}

PEFT_STRAYS = {"style/README.md": b"# style", "style/optimizer.pt": b"pickle", "other.safetensors": weights(8)}


@pytest.mark.parametrize("folder", ["style", "."])
@pytest.mark.parametrize("local", [True, False], ids=["local", "hub"])
def test_a_peft_folder_is_its_weights_and_its_configuration(
    hub: LoopbackHub, tmp_path: Path, local: bool, folder: str
) -> None:
    files = {(name if folder == "style" else name.removeprefix("style/")): data for name, data in PEFT.items()}
    everything = {**files, **PEFT_STRAYS}
    if local:
        source = in_folder(write(tmp_path / "loras", everything))
    else:
        hub.push(LORA, everything)
        source = on_hub(LORA)
    pinned = lock_lora(source, folder, previous=None)
    assert pinned.files == records(files)
    assert pinned.lora_name == folder
    assert (locate(pinned) / pinned.lora_name / "adapter_config.json").read_bytes() == everything[min(files)]
    assert not [call for call in hub.calls("/resolve/") if "other" in call.line or "optimizer" in call.line]
    asked = len(hub.log)
    assert lock_lora(source, folder, previous=pinned) == pinned
    assert len(hub.log) == asked


def test_a_flipped_byte_in_the_configuration_of_a_peft_folder_is_refused(hub: LoopbackHub) -> None:
    hub.push(LORA, PEFT)
    hub.faults.append(Fault(r"GET .*/resolve/.*/adapter_config\.json", times=-1, flip_at=3))
    message = refusal(lambda: lock_lora(on_hub(LORA), "style", previous=None))
    assert f"style/adapter_config.json of {LORA}@" in message
    assert "git blob" in message


def test_a_peft_folder_and_a_file_of_a_repository_share_its_commit(hub: LoopbackHub) -> None:
    commit = hub.push(LORA, {**PEFT, **PEFT_STRAYS})
    before = lock_lora(on_hub(LORA), "other.safetensors", previous=None)
    hub.push(LORA, {"style/adapter_config.json": b"{}"})
    after = lock_lora(on_hub(LORA), "style", previous=before)
    assert (after.revision, after.files) == (commit.oid, records(PEFT))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"style/adapter_model.safetensors": b"w"}, "there is no style/adapter_config.json; name the .safetensors"),
        ({"style/adapter_config.json": b"{}"}, "there is no style/adapter_model.safetensors"),
        ({"style/adapter_config.json": b"{}", "style/adapter_model.bin": b"p"}, "a pickle (style/adapter_model.bin)"),
    ],
)
def test_a_folder_that_is_not_peft_s_is_refused(tmp_path: Path, files: dict[str, bytes], said: str) -> None:
    source = in_folder(write(tmp_path / "loras", files))
    message = refusal(lambda: lock_lora(source, "style", previous=None), BadLora)
    assert "'style' of" in message
    assert said in message
