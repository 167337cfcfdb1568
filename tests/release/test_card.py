"""The card: front matter that the Hub reads, code that runs, nothing that is only ours."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from lora_fuse.lora.inputs import Selection
from lora_fuse.machine.files import FileRecord
from lora_fuse.recipe.records import License, Lock, Manifest, MergedFile, MergedLora, Tool
from lora_fuse.recipe.stated_licence import read_license
from lora_fuse.release.card import Evidence, ShownCase, ShownExport, Usage, model_card
from lora_fuse.release.licences import SETTING, resolve_licence

COMMIT, SHA256 = "c" * 40, "5" * 64
APACHE, MIT = License("apache-2.0"), License("mit")
BASE = Lock("owner/base", None, "main", COMMIT, {"model_index.json": FileRecord(2, SHA256)}, APACHE)
LORA = MergedLora(
    "lightning", 0.8, SHA256, "lightning.safetensors", repo_id="other/lora", revision="d" * 40, license=APACHE
)
FILES = {
    "vae/model.safetensors": MergedFile(5, SHA256, "base"),
    "transformer/one.safetensors": MergedFile(5, "f" * 64, "fused"),
    "scheduler/scheduler_config.json": MergedFile(5, SHA256, "generated"),
}
RABBIT = ShownCase(
    name="rabbit",
    prompt="Make it | purple, *please*",
    seed=7,
    height=128,
    width=None,
    verdict="exact",
    to_golden="identical",
    to_unfused="61.5 dB",
    over_floor="0.93",
    picture="images/rabbit.png",
    inputs=("images/rabbit.input.png",),
)
EVIDENCE = Evidence("passed: every picture is the approved one", "cpu-somewhere", (RABBIT,), "images/blocks.png")
MANIFEST = Manifest(1, "edit_4steps", BASE, (LORA,), 0.8, 720, FILES, Tool("1.2.3", "abc1234", dirty=False))


def card(
    manifest: Manifest = MANIFEST,
    repo_id: str | None = "alice/edit",
    evidence: Evidence = Evidence("passed"),  # noqa: B008 (frozen)
    licence: str | None = None,
    **changes: Any,
) -> str:
    usage = replace(Usage("QwenImageEditPipeline", 4, 1.0, " ", None), **changes)
    settled = resolve_licence(manifest, licence)
    return model_card(manifest, usage=usage, evidence=evidence, licence=settled, repo_id=repo_id)


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
        "license": "apache-2.0",
        "base_model": ["owner/base", "other/lora"],
        "base_model_relation": "merge",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "tags": ["lora-fuse", "merge", "4-steps"],
    }
    assert vars(ModelCard(card()).data).items() >= front_matter(card()).items()
    assert front_matter(card(pipeline="QwenImagePipeline"))["pipeline_tag"] == "text-to-image"


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
    assert "from lora_fuse import condition_area" in text
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
        f"BASE=$(hf download owner/base --revision {COMMIT} --quiet)",
        f"hf download other/lora lightning.safetensors --revision {'d' * 40} --quiet",
        '"$BASE" OUT --lora "$LORA_1" --scale 0.8',
        f"{'f' * 64}  transformer/one.safetensors",
        "1.2.3 (git abc1234)",
    ):
        assert fact in text


def test_local_parts_are_named_as_the_command_line_wants_them() -> None:
    lora = replace(LORA, repo_id=None, revision=None)
    text = card(replace(MANIFEST, recipe=None, base=None, loras=(lora,), tool=Tool("1.2.3")), repo_id=None)
    assert "python -m lora_fuse fuse BASE OUT --lora lightning.safetensors --scale 0.8" in text
    assert text.splitlines()[text.splitlines().index("---", 1) + 2] == "# merged"


def test_the_selection_is_part_of_the_way_to_rebuild() -> None:
    chosen = Selection(("*.attn.*",), ("*.0.*",), {"*.1.*": 0.5})
    text = card(replace(MANIFEST, selection=chosen))
    for option in ("--only '*.attn.*'", "--skip '*.0.*'", "--module-scale '*.1.*=0.5'", "--scheduler"):
        assert option in text


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


# ---------------------------------------------------------------- what was checked


def test_the_cases_are_a_table_with_verdict_and_figures_and_their_pictures() -> None:
    text = card(evidence=EVIDENCE)
    assert "| rabbit | exact | identical | 61.5 dB | 0.93 |" in text
    assert "![rabbit](images/rabbit.png)" in text
    assert "![input of rabbit](images/rabbit.input.png)" in text
    assert "![change of each block](images/blocks.png)" in text
    assert "cpu-somewhere" in text


def test_a_prompt_cannot_break_the_table() -> None:
    html = MarkdownIt().enable("table").render(card(evidence=EVIDENCE).split("---\n", 2)[2])
    assert "<td>Make it | purple, *please*, seed 7</td>" in html
    assert html.count("<table>") == 3
    assert html.count('<img src="images/') == 3


def test_the_snippet_makes_the_first_case_with_a_picture_from_the_repository() -> None:
    text = card(evidence=EVIDENCE)
    given = arguments(text)
    assert (given["prompt"], given["height"]) == (RABBIT.prompt, 128)
    assert "width" not in given
    assert 'hf_hub_download("alice/edit", "images/rabbit.input.png")' in snippet(text)
    assert "manual_seed(7)" in snippet(text)
    assert "makes the first of the pictures below" in text


def test_several_input_pictures_are_a_list() -> None:
    two = replace(RABBIT, inputs=("images/a.png", "images/b.png"))
    text = snippet(card(evidence=replace(EVIDENCE, cases=(two,)), pipeline="QwenImageEditPlusPipeline"))
    assert 'pictures = [load_image(hf_hub_download("alice/edit", "images/a.png")), load_image(' in text
    assert "image=pictures," in text


def test_exports_are_listed_with_their_sha256() -> None:
    export = ShownExport("diffusion_models/x.safetensors", "one file", "e" * 64)
    usage = Usage("QwenImageEditPipeline", 4, 1.0, " ", None)
    settled = resolve_licence(MANIFEST)
    text = model_card(MANIFEST, usage=usage, evidence=EVIDENCE, licence=settled, repo_id="alice/edit", exports=[export])
    assert f"| `diffusion_models/x.safetensors` | one file | `{'e' * 64}` |" in text


# ---------------------------------------------------------------- licences


def merge_of(*stated: License | None) -> Manifest:
    base, *loras = stated
    parts = tuple(replace(LORA, license=one, repo_id=f"other/lora{n}") for n, one in enumerate(loras))
    return replace(MANIFEST, base=replace(BASE, license=base), loras=parts)


OPENRAIL = License("openrail++")
FLUX = License("other", "flux-1-dev", "https://example.org/LICENSE")


@pytest.mark.parametrize(
    ("parts", "settled"),
    [
        ((APACHE, APACHE), "apache-2.0"),
        ((MIT, APACHE), "apache-2.0"),
        ((License("cc0-1.0"), MIT), "mit"),
        ((MIT, License("bsd-3-clause"), License("cc0-1.0")), "bsd-3-clause"),
        ((OPENRAIL, OPENRAIL), "openrail++"),
        ((License("gpl-3.0"), License("gpl-3.0")), "gpl-3.0"),
        ((FLUX, FLUX), "other"),
    ],
    ids=str,
)
def test_licences_that_go_together(parts: tuple[License, ...], settled: str) -> None:
    found = resolve_licence(merge_of(*parts))
    assert (found.license.id, found.problem) == (settled, None)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((APACHE, OPENRAIL), ["owner/base is under apache-2.0", "other/lora0 under openrail++"]),
        ((OPENRAIL, License("creativeml-openrail-m")), ["openrail++", "creativeml-openrail-m"]),
        ((License("gpl-3.0"), APACHE), ["gpl-3.0", "apache-2.0"]),
        ((APACHE, FLUX), ["apache-2.0", "flux-1-dev"]),
        ((FLUX, replace(FLUX, link="https://example.org/other")), ["flux-1-dev", "other/lora0"]),
        ((License("cc-by-nd-4.0"), License("cc-by-nd-4.0")), ["forbids derivatives"]),
        ((APACHE, None), ["other/lora0 states no licence", "owner/base: apache-2.0"]),
        ((None, APACHE), ["owner/base states no licence", "other/lora0: apache-2.0"]),
        ((APACHE, License("unknown")), ["unknown", "names no text"]),
        ((License("other"), License("other")), ["names no text"]),
        ((APACHE, License("other", "apache-2.0, mit")), ["apache-2.0, mit", "names no text"]),
    ],
    ids=str,
)
def test_licences_that_do_not_are_named_with_the_setting_that_states_one(
    parts: tuple[License | None, ...], words: list[str]
) -> None:
    found = resolve_licence(merge_of(*parts))
    assert found.license.id == "other"
    for word in (*words, SETTING):
        assert word in str(found.problem)
    assert "\n" not in str(found.problem)
    by_hand = resolve_licence(merge_of(*parts), "mit")
    assert (by_hand.license, by_hand.problem) == (License("mit", origin="by hand"), None)


def test_a_card_of_an_unsettled_licence_says_other_and_warns() -> None:
    text = card(merge_of(APACHE, OPENRAIL))
    assert (front_matter(text)["license"], front_matter(text)["license_name"]) == ("other", "unknown")
    assert "**Warning:** the licence of this merge is not settled" in text
    assert "| openrail++ |" in text
    stated = card(merge_of(APACHE, OPENRAIL), licence="openrail")
    assert front_matter(stated)["license"] == "openrail"
    assert "stated by hand" in stated
    assert "Warning" not in stated


def test_the_name_and_link_of_another_licence_are_in_the_front_matter() -> None:
    data = front_matter(card(merge_of(FLUX, FLUX)))
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", FLUX.name, FLUX.link)


PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"README.md": "# no front matter\nlicense: mit\n"}, None),
        ({"README.md": "---\nlicense: MIT\n---\n# x\n"}, License("mit", origin="front matter")),
        ({"README.md": "---\nlicense: [apache-2.0]\n---\n"}, License("apache-2.0", origin="front matter")),
        (
            {"README.md": "---\nlicense: [apache-2.0, mit]\n---\n"},
            License("other", "apache-2.0, mit", None, "front matter"),
        ),
        (
            {"README.md": "---\nlicense: [\n---\n", "LICENSE": "CC0 1.0 Universal\n"},
            License("cc0-1.0", origin="licence file"),
        ),
        ({"LICENSE.txt": (PROJECT / "LICENSE").read_text()}, License("apache-2.0", origin="licence file")),
        ({"LICENSE": "Do what you like on Mondays."}, License("other", "LICENSE", None, "licence file")),
    ],
    ids=["nothing", "text", "front matter", "list of one", "list of two", "broken", "apache", "own"],
)
def test_a_local_folder_states_its_licence(tmp_path: Path, files: dict[str, str], expected: License | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert read_license(tmp_path) == expected


def test_pocket_states_its_licence() -> None:
    assert [read_license(PROJECT / f"pocket/{part}") for part in ("model", "lora")] == [
        License("apache-2.0", origin="front matter")
    ] * 2
