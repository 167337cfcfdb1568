"""A base that wants more than to be loaded: code, a question, the network, a token, a template to be rendered."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_fuse.errors import RenderFailed
from lora_fuse.pictures.environment import sealed
from lora_fuse.pictures.render import Pipeline, load_pipeline, shared_components

MODEL = Path(__file__).resolve().parents[2] / "pocket/model"


@pytest.fixture(scope="module")
def shared() -> dict[str, object]:
    """The parts that most tests here need to be whole and no more."""
    return shared_components(load_pipeline(MODEL, "QwenImageEditPipeline", dtype="float32"))


def changed(folder: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the pocket base, one JSON file of it edited."""
    shutil.copytree(MODEL, folder)
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    edit(content)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def load(folder: Path, **shared: object) -> Pipeline:
    return load_pipeline(folder, "QwenImageEditPipeline", dtype="float32", shared=shared)


CODE = {"auto_map": {"AutoProcessor": "evil/code--m.X", "AutoTokenizer": ["evil/code--m.X", None]}}
ASKING: dict[str, tuple[str, dict[str, Any], str]] = {
    "code of another repository": ("processor/preprocessor_config.json", CODE, "auto_map"),
    "another library's class": ("model_index.json", {"vae": ["os", "system"]}, "vae = "),
    "a pipeline of its own": ("model_index.json", {"_class_name": ["pipeline", "Own"]}, "_class_name"),
}


@pytest.mark.parametrize("name", ASKING)
def test_a_base_that_asks_for_code_is_not_loaded(name: str, tmp_path: Path) -> None:
    file, entries, word = ASKING[name]
    folder = changed(tmp_path / "base", file, lambda content: content.update(entries))
    with pytest.raises(RenderFailed, match=rf"base: {file} says {word}.* no code of a base is run here"):
        load(folder)


BROKEN: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "no class": ("model_index.json", lambda c: c.pop("_class_name"), "base cannot be loaded .*_class_name"),
    "text for a number": ("transformer/config.json", lambda c: c.update(patch_size="x"), "base/transformer cannot"),
    "null for a number": ("vae/config.json", lambda c: c.update(z_dim=None), "base/vae cannot be loaded"),
    "more memory than there is": (
        "scheduler/scheduler_config.json",
        lambda c: c.update(num_train_timesteps=2**50),
        "base/scheduler cannot be loaded .*Unable to allocate",
    ),
    "a library that is not here": (
        "text_encoder/config.json",
        lambda c: c.update(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "base/text_encoder cannot be loaded .*bitsandbytes",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_configuration_is_named_with_its_part(name: str, tmp_path: Path, shared: dict[str, object]) -> None:
    file, edit, words = BROKEN[name]
    whole = {part: one for part, one in shared.items() if part != Path(file).parent.name}
    with pytest.raises(RenderFailed, match=words):
        load(changed(tmp_path / "base", file, edit), **whole)


def test_deep_json_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = changed(tmp_path / "base", "vae/config.json", lambda _: None)
    (folder / "vae/config.json").write_text("[" * 200_000)
    with pytest.raises(RenderFailed, match=r"vae/config\.json is not readable JSON"):
        load(folder)


def test_a_vocabulary_larger_than_any_is_refused(tmp_path: Path) -> None:
    folder = changed(tmp_path / "base", "vae/config.json", lambda _: None)
    (folder / "vae/left.bin").write_bytes(b"")
    os.truncate(folder / "vae/left.bin", 1 << 30)  # of weights that stay behind nobody reads a byte
    with (folder / "tokenizer/merges.txt").open("wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(RenderFailed, match=r"tokenizer/merges\.txt has 100000001 bytes, and at most 100000000"):
        load(folder)


def test_no_chat_template_is_ever_rendered(tmp_path: Path, shared: dict[str, object]) -> None:
    """Whatever it holds: a way out of a sandbox, a loop without an end."""
    hostile = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for a in range(10**9) %}{{ 'x' * 10**9 }}{% endfor %}"
    folder = changed(tmp_path / "base", "processor/tokenizer_config.json", lambda c: c.update(chat_template=hostile))
    shutil.copy(folder / "processor/tokenizer_config.json", folder / "tokenizer/tokenizer_config.json")
    (folder / "processor/chat_template.jinja").write_text(hostile)
    whole = {name: part for name, part in shared.items() if name not in ("processor", "tokenizer")}
    pipe = load(folder, **whole)
    for holder in (pipe.tokenizer, pipe.processor, pipe.processor.tokenizer):
        assert holder.chat_template is None
        with pytest.raises(ValueError, match="template"):
            holder.apply_chat_template([{"role": "user", "content": "a cat"}])


def test_a_sealed_library_finds_no_token_no_network_and_nobody_to_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    (tmp_path / "token").write_text("hf_stored", encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_old")
    before = huggingface_hub.get_token()
    with sealed():
        with sealed():
            pass
        assert huggingface_hub.get_token() is None
        assert not {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"} & os.environ.keys()
        with pytest.raises(OfflineModeIsEnabled):
            huggingface_hub.HfApi(endpoint="http://127.0.0.1:9").model_info("a/b")
        with pytest.raises(EOFError):
            input("Do you wish to run the custom code? [y/N] ")
    assert huggingface_hub.get_token() == before == "hf_old"
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_yes_on_stdin_is_not_read(tmp_path: Path) -> None:
    """In a process of its own, and in one that it starts: the answer that somebody piped in stays where it is."""
    code = (
        "import subprocess, sys; from lora_fuse.pictures.environment import sealed\n"
        "with sealed():\n"
        "    there = subprocess.run([sys.executable, '-c', 'print(repr(input()))'], capture_output=True).stdout\n"
        "print(there, repr(input()))"
    )
    done = subprocess.run([sys.executable, "-c", code], input="y\n", capture_output=True, text=True, check=True)
    assert done.stdout == "b'' 'y'\n"
