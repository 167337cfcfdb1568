"""The card: front matter that the Hub reads, code that runs, nothing that is only ours."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

import yaml

from lora_fuse.card import Usage, model_card
from lora_fuse.records import FileRecord, Lock, Manifest, MergedFile, MergedLora, Tool

COMMIT, SHA256 = "c" * 40, "5" * 64
BASE = Lock("owner/base", None, "main", COMMIT, {"model_index.json": FileRecord(2, SHA256)})
LORA = MergedLora("lightning", 0.8, SHA256, "lightning.safetensors", repo_id="other/lora", revision="d" * 40)
FILES = {"vae/model.safetensors": MergedFile(5, SHA256, "base")}
MANIFEST = Manifest(1, "edit_4steps", BASE, (LORA,), 0.8, 720, FILES, Tool("1.2.3", "abc1234", dirty=False))


def card(manifest: Manifest = MANIFEST, repo_id: str | None = "alice/edit", **changes: Any) -> str:
    usage = replace(Usage("QwenImageEditPipeline", 4, 1.0, " ", None), **changes)
    return model_card(manifest, usage=usage, verdict="passed", repo_id=repo_id)


def front_matter(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    content: dict[str, Any] = yaml.safe_load(head)
    return content


def snippet(text: str) -> str:
    return text.partition("```python\n")[2].partition("```")[0]


def arguments(text: str) -> dict[str, Any]:
    calls = [node for node in ast.walk(ast.parse(snippet(text))) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "pipe"]
    values = {keyword.arg or "": keyword.value for keyword in call.keywords}
    return {name: node.value if isinstance(node, ast.Constant) else node for name, node in values.items()}


def test_the_front_matter_names_base_and_lora_and_how_they_were_joined() -> None:
    assert front_matter(card()) == {
        "base_model": ["owner/base", "other/lora"],
        "base_model_relation": "merge",
        "library_name": "diffusers",
        "tags": ["lora-fuse"],
    }


def test_local_sources_claim_no_lineage_and_show_no_path() -> None:
    base = replace(BASE, repo_id=None, path="/home/someone/base")
    lora = replace(LORA, repo_id=None, revision=None, path="/home/someone/loras")
    text = card(replace(MANIFEST, base=base, loras=(lora,)))
    assert "base_model" not in front_matter(text)
    assert "/home/someone" not in text


def test_two_loras_of_one_repository_are_listed_once_above_and_twice_below() -> None:
    text = card(replace(MANIFEST, loras=(LORA, replace(LORA, name="second", scale=0.25, sha256="6" * 64))))
    assert front_matter(text)["base_model"] == ["owner/base", "other/lora"]
    assert "2 LoRAs are fused" in text
    assert f"| `{SHA256}` | 0.8 |" in text
    assert f"| `{'6' * 64}` | 0.25 |" in text


def test_the_snippet_is_python_with_the_settings_of_the_recipe() -> None:
    given = arguments(card(steps=8, true_cfg_scale=1.5, negative_prompt='a "quoted" one'))
    assert (given["num_inference_steps"], given["true_cfg_scale"]) == (8, 1.5)
    assert given["negative_prompt"] == 'a "quoted" one'
    assert "image" in given


def test_a_model_of_small_pictures_is_shown_with_the_area_that_it_needs() -> None:
    text = snippet(card(condition_area=16384))
    block = next(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.With))
    assert ast.unparse(block.items[0]) == "condition_area(16384)"
    assert "from lora_fuse.regression.render import condition_area" in text
    assert "condition_area" not in card() + card(pipeline="QwenImagePipeline", condition_area=16384)


def test_a_text_to_image_pipeline_is_given_no_picture_and_no_absent_negative_prompt() -> None:
    text = card(pipeline="QwenImagePipeline", negative_prompt=None)
    assert not {"image", "negative_prompt"} & arguments(text).keys()
    assert 'QwenImagePipeline.from_pretrained("alice/edit"' in snippet(text)


def test_commits_hash_scale_verdict_and_the_way_to_rebuild_are_there() -> None:
    text = card()
    for fact in (
        COMMIT,
        "d" * 40,
        SHA256,
        "| 0.8 |",
        "passed",
        "recipe=edit_4steps fuse.scale=0.8",
        "1.2.3 (git abc1234)",
    ):
        assert fact in text


def test_without_a_recipe_the_command_line_is_shown() -> None:
    text = card(replace(MANIFEST, recipe=None, base=None, tool=Tool("1.2.3")), repo_id=None)
    assert "python -m lora_fuse fuse BASE OUT --lora lightning.safetensors --scale 0.8" in text
    assert text.splitlines()[text.splitlines().index("---", 1) + 2] == "# merged"


def test_a_lora_that_was_made_for_another_base_is_warned_of() -> None:
    base = replace(BASE, repo_id="Qwen/Qwen-Image-Edit")
    file = "Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors"
    lora = replace(LORA, repo_id="lightx2v/Qwen-Image-Lightning", filename=file)
    said = f"**Warning:** {file} was made for Qwen/Qwen-Image-Edit-2509, not for Qwen/Qwen-Image-Edit: it merges"
    assert said in card(replace(MANIFEST, base=base, loras=(lora,)))
    assert "Warning" not in card(
        replace(MANIFEST, base=replace(BASE, repo_id="Qwen/Qwen-Image-Edit-2509"), loras=(lora,))
    )
    assert "Warning" not in card()


def test_the_same_manifest_gives_the_same_card() -> None:
    assert card() == card()
