"""Every way in which the JSON of a base asks for code is seen, and nothing else is taken for one."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from lora_fuse import cli
from lora_fuse.checkpoint.foreign_code import PIPELINES, asked_code, countless_parts
from tests.support import tiny

ASKING = {
    "auto_map of this repository": ("vae/config.json", {"auto_map": {"AutoModel": "modeling.M"}}, "auto_map"),
    "auto_map of another": ("p/tokenizer_config.json", {"auto_map": ["evil/code--m.X", None]}, "auto_map"),
    "auto_map further down": ("t/config.json", {"text_config": [{"auto_map": {"A": "m.X"}}]}, "auto_map"),
    "a custom pipeline": ("model_index.json", {"custom_pipeline": "lpw_stable_diffusion"}, "custom_pipeline"),
    "custom pipelines": ("t/config.json", {"custom_pipelines": {"x": {"impl": "m.X"}}}, "custom_pipelines"),
    "trust": ("t/config.json", {"trust_remote_code": True}, "trust_remote_code"),
    "a pipeline of its own": ("model_index.json", {"_class_name": ["pipeline", "Own"]}, "_class_name"),
    "a class by its path": ("vae/config.json", {"_class_name": "../code/m.X"}, "_class_name"),
    "a processor elsewhere": ("p/preprocessor_config.json", {"processor_class": "evil--m.X"}, "processor_class"),
    "another library": ("model_index.json", {"vae": ["os", "system"]}, "vae"),
    "a module of diffusers": ("model_index.json", {"vae": ["diffusers.utils", "X"]}, "vae"),
    "a class of three": ("model_index.json", {"vae": ["diffusers", "A", {"repo": "evil/x"}]}, "vae"),
    "no name of a class": ("model_index.json", {"vae": ["diffusers", "utils.X"]}, "vae"),
    "an index in a component": ("prior/model_index.json", {"vae": ["own", "X"]}, "vae"),
    "kernels of a repository": ("t/config.json", {"attn_implementation": "evil/attn"}, "attn_implementation"),
}


@pytest.mark.parametrize("name", ASKING)
def test_what_asks_for_code_is_named_with_file_key_and_value(name: str) -> None:
    file, content, key = ASKING[name]
    (words,) = asked_code(file, content)
    assert words.startswith(f"{file} says {key} = ")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model_index.json", {"_class_name": "P", "vae": ["diffusers", "A"], "safety_checker": [None, None]}),
        ("model_index.json", {"boundary_ratio": 0.5, "sizes": None, "text_encoder_select_layers": [2, 5]}),
        ("model_index.json", {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}),
        ("t/vocab.json", {"auto_map": 17, "custom_pipeline": 18, "_class_name": 0}),
        ("t/config.json", {"auto_map": {}, "_class_name": None, "attn_implementation": "sdpa"}),
        ("t/tokenizer.json", [["auto_map", "custom_pipeline"]]),
    ],
)
def test_a_plain_file_asks_for_nothing(file: str, content: object) -> None:
    assert list(asked_code(file, content)) == []


def test_diffusers_own_folders_with_components_are_known_and_no_other() -> None:
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None
    folder = Path(str(spec.origin)).parent / "pipelines"
    classes = re.compile(r"^class \w+\(.*(?:Mixin|Module|PreTrainedModel)\b.*\)", re.MULTILINE)
    parents = re.compile(r"ModelMixin|nn\.Module|PreTrainedModel|ConfigMixin|SchedulerMixin")
    found = {
        path.parent.name
        for path in folder.glob("*/**/*.py")
        if any(parents.search(match.group()) for match in classes.finditer(path.read_text(encoding="utf-8")))
    }
    assert found == PIPELINES


@pytest.mark.parametrize(
    "content",
    [
        {"num_layers": 10**9},
        {"text_config": {"num_hidden_layers": 10_001}},
        {"depths": [2, 1e300]},
        {"block_out": 1e999},
    ],
)
def test_more_parts_than_any_model_has_are_named(content: dict[str, object]) -> None:
    assert len(list(countless_parts("t/config.json", content))) == 1
    assert list(countless_parts("t/vocab.json", content)) == []


def test_the_configurations_of_models_are_within_bounds() -> None:
    for path in (Path(__file__).resolve().parents[2] / "pocket/model").rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert [*asked_code(path.name, content), *countless_parts(path.name, content)] == []
    usual = {"num_layers": 60, "num_attention_heads": 64, "fullatt_block_indexes": [7, 31], "layer_types": ["full"]}
    assert list(countless_parts("config.json", usual | {"vocab_size": 152_064, "num_embeddings": 16_384})) == []


def test_a_deep_file_is_read_to_its_end() -> None:
    deep: object = {"auto_map": "m.X"}
    for _ in range(100_000):
        deep = [deep]
    assert len(list(asked_code("t/config.json", deep))) == 1


def test_a_plain_fuse_goes_on_and_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_pipeline(tmp_path / "base", tiny.weights())
    config = tmp_path / "base/transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoModel": "evil/code--m.X"}}))
    lora = tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors())
    assert cli.main(["plan", str(tmp_path / "base"), "--lora", str(lora)]) == 0
    assert "warning: transformer/config.json says auto_map = " in capsys.readouterr().err
