"""The card: front matter that the Hub reads, code that runs, nothing that is only ours; and its plot of the blocks."""

import ast
import re
from dataclasses import replace
from typing import Any

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from lora_fuse.exports import FORMATS, readers_of
from lora_fuse.lora.inputs import Selection
from lora_fuse.release.block_plot import block_plot
from lora_fuse.release.card import ShownExport, Usage, model_card
from lora_fuse.release.licences import resolve_licence
from lora_fuse.release.regression_evidence import shown_evidence
from tests.support.cards import (
    BASE,
    COMMIT,
    EVIDENCE,
    LORA,
    MANIFEST,
    RABBIT,
    SHA256,
    TOOL,
    card,
    front_matter,
    publishing,
)


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


def test_sigmas_of_the_call_and_the_name_of_its_guidance_are_in_the_snippet_and_a_clip_is_written() -> None:
    sigmas = (1.0, 0.6509, 0.4374, 0.2932)
    text = card(pipeline="Flux2Pipeline", true_cfg_scale=2.5, negative_prompt=None, call_sigmas=sigmas)
    given = arguments(text)
    assert ast.literal_eval(given["sigmas"]) == list(sigmas)
    assert (given["guidance_scale"], "true_cfg_scale" in given) == (2.5, False)
    assert "4 steps at `guidance_scale` 2.5 with the `sigmas` of the call above" in text
    shown = replace(EVIDENCE, cases=(replace(RABBIT, inputs=(), frames=81),))
    text = card(evidence=shown, pipeline="WanPipeline", negative_prompt=None)
    assert front_matter(text)["pipeline_tag"] == "text-to-video"
    assert (arguments(text)["num_frames"], "sigmas" in arguments(text)) == (81, False)
    assert 'export_to_video(frames, "output.mp4", fps=16)' in snippet(text)


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
    text = card(replace(MANIFEST, recipe=None, base=None, loras=(lora,)), repo_id=None)
    assert "python -m lora_fuse fuse BASE OUT --lora lightning.safetensors --scale 0.8" in text
    assert text.splitlines()[text.splitlines().index("---", 1) + 2] == "# merged"


def test_the_selection_is_part_of_the_way_to_rebuild() -> None:
    chosen = Selection(("*.attn.*",), ("*.0.*",), {"*.1.*": 0.5})
    text = card(replace(MANIFEST, selection=chosen))
    for option in ("--only '*.attn.*'", "--skip '*.0.*'", "--module-scale '*.1.*=0.5'", "--scheduler"):
        assert option in text


def test_components_and_keys_that_are_left_out_are_said_and_part_of_the_way_to_rebuild() -> None:
    high = replace(LORA, components=("transformer_2",), left_out=("a.k_img.alpha", "b.k_img.alpha"))
    both = replace(LORA, name="both", components=("transformer", "transformer_2"))
    chosen = Selection(leave_out=("*.k_img.*",))
    counts = {"transformer": 10, "transformer_2": 20}
    text = card(replace(MANIFEST, loras=(high, both), selection=chosen, components=counts))
    assert "| LoRA in `transformer_2` |" in text
    assert "| LoRA in `transformer`, `transformer_2` |" in text
    assert "2 keys that no module of the base is for are left out on purpose: `*.k_img.*`." in text
    assert "--scale 0.8 --component transformer_2 \\" in text
    assert "--scale 0.8 --component auto \\" in text
    assert "--leave-out '*.k_img.*'" in text
    assert "--component" not in card()
    assert "left out" not in card()


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


EXPORTS = tuple(
    ShownExport(f"x/x.{name}", name, "QwenImageTransformer2DModel", "3 MB", "e" * 64, "0.01", "cosine 0.996", "25")
    for name in FORMATS
)


def test_exports_are_listed_with_what_was_measured_and_the_engines_that_read_them() -> None:
    usage = Usage("QwenImageEditPipeline", 4, 1.0, " ", None)
    settled = resolve_licence(MANIFEST)
    where = publishing("alice/edit", tag="v1", key="signing.pem")
    shown = replace(EVIDENCE, exports=EXPORTS)
    text = model_card(MANIFEST, usage=usage, evidence=shown, licence=settled, tool=TOOL, publish=where)
    assert "| `x/x.int8_convrot` | int8, rotated, a scale a row | 3 MB | 0.01 | cosine 0.996 | 25 | ComfyUI (" in text
    assert f"| `{'e' * 64}` |" in text
    assert "`x/x.nvfp4` in ComfyUI: the node" in text
    assert "sd-cli --diffusion-model x/x.gguf_q8_0 " in text
    codes = re.findall(r"in diffusers:\n\n```python\n(.*?)```", text, re.DOTALL)
    assert all('config="alice/edit"' in code and compile(code, "card", "exec") for code in codes)
    assert len(codes) == sum(any(e.name == "diffusers" for e in readers_of(name)) for name in FORMATS)
    release = 'verify "$(hf download alice/edit --revision v1 --quiet)" --repository alice/edit --tag v1\n'
    assert release in text
    assert "is checked with `--public-key FILE`" in text


def test_an_export_s_name_closes_no_quote_of_its_commands() -> None:
    hostile = replace(EXPORTS[0], path='x";import os;"$(rm).safetensors')
    loads = {language: str(load) for _, language, load in hostile.loading('a/b"')}
    assert 'from_single_file(\n    "x\\";import os;\\"$(rm).safetensors"' in loads["python"]
    assert 'config="a/b\\""' in loads["python"]
    assert "'x\";import os;\"$(rm).safetensors'" in loads["sh"]


def test_a_card_without_a_signature_says_so_and_names_no_other_release() -> None:
    assert 'verify "$(hf download alice/edit --quiet)" --repository alice/edit\n' in card()
    assert "Nobody signed it" in card()
    assert "lora_fuse verify FOLDER\n" in card(repo_id=None)


def test_the_plot_of_the_blocks_is_small_and_the_same_each_time() -> None:
    blocks = [(str(number), number / 60) for number in range(60)]
    picture = block_plot(blocks)
    assert picture == block_plot(blocks)
    assert len(picture) < 10_000
    assert picture != block_plot([*blocks[:-1], ("59", 0.5)])
    assert block_plot([("0", 0.0)])


def test_the_card_says_what_the_weights_hold_of_the_change_in_all_and_of_each_target() -> None:
    change = {"relative_norm": 0.1, "unchanged": 0.5}
    changes = {
        "good.weight": {**change, "cosine": 0.9999, "noise": 0.0002},
        "bad|weight": {**change, "cosine": 0.76, "noise": 0.7},
        "zero.weight": {**change, "cosine": None, "noise": None},
    }
    verify = {"update": {"cosine": 0.9, "noise": 0.2}, "changes": changes, "warnings": ["little is kept of it"]}
    evidence = shown_evidence({"verdict": "exact", "environment": "here"}, verify, [], None)
    text = card(evidence=evidence)
    assert "a cosine of 0.9 with the change that was meant" in text
    assert "rounding added 0.2 of its energy" in text
    assert "> **Warning:** little is kept of it." in text
    assert text.index("| 0.76 | 0.7 |") < text.index("| `good.weight` | 0.9999 | 0.0002 |")
    assert "zero.weight" not in text
    nothing: dict[str, Any] = {"update": {}, "changes": {}, "warnings": []}
    assert "cosine" not in card(evidence=shown_evidence({"verdict": "exact", "environment": "here"}, nothing, [], None))


def test_a_merge_in_another_dtype_is_loaded_in_it() -> None:
    assert "dtype=torch.bfloat16" in snippet(card())
    text = card(replace(MANIFEST, dtype="F32"))
    assert "dtype=torch.float32" in snippet(text)
    assert "rounded to float32" in text
