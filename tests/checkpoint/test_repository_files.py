"""The files of a base are sorted: what is fused, what is taken over, and what is left behind, from names alone."""

import json
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fuse.checkpoint import repository_files
from lora_fuse.checkpoint.file_roles import Role, role_of
from lora_fuse.checkpoint.repository_files import (
    SortedFiles,
    component_names,
    is_pickle,
    left_behind,
    named_components,
    sort_files,
)
from lora_fuse.errors import BadSource

PLAIN = "diffusion_pytorch_model.safetensors"
FP16 = "diffusion_pytorch_model.fp16.safetensors"
INDEX = f"{PLAIN}.index.json"
PAIRS = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
WHOLE = ("unet/config.json", f"unet/{PLAIN}", "vae/config.json", f"vae/{PLAIN}", "tokenizer/vocab.json")


def parts(stem: str, count: int) -> list[str]:
    return [f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def index_of(shards: Iterable[str]) -> dict[str, object]:
    return {"metadata": {}, "weight_map": {f"w{number}": shard for number, shard in enumerate(shards)}}


def sort(names: Iterable[str], component: str = "unet", contents: Mapping[str, object] | None = None) -> SortedFiles:
    """Sort files of a repository whose JSON files hold `contents`, by file name without the ending, or else nothing."""
    known: Mapping[str, object] = {"model_index": {"_class_name": "P", **PAIRS}, **(contents or {})}

    def read(name: str) -> object:
        return known.get(name.rpartition("/")[2].removesuffix(".json"), {})

    listed = [*names, *(["model_index.json"] if component else [])]
    return sort_files(listed, component, label="here", read=read, fail=BadSource)


def test_pickles_are_known_by_their_suffix_in_any_case() -> None:
    assert all(map(is_pickle, ("a/b.bin", "x.PT", "x.ckpt", "x.pkl", "x.pickle", "x.pth")))
    assert not any(map(is_pickle, ("a.safetensors", "bin/a.json", "config.json")))


def test_components_that_are_there_are_folders_of_that_very_name(tmp_path: Path) -> None:
    for name in ("base/vae", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    named = {name: ["diffusers", "V"] for name in ("vae", "unet", "../elsewhere", "x" * 5000, "a\0b")}
    (tmp_path / "base/model_index.json").write_text(json.dumps({"_class_name": "P", **named}))
    assert component_names(tmp_path / "base") == {"vae"}


def test_components_are_the_pairs_that_are_not_null() -> None:
    index = {"_class_name": "P", "vae": ["diffusers", "V"], "checker": [None, None], "flag": True, "_x": ["a", "b"]}
    assert named_components(index) == {"vae": ("diffusers", "V")}
    others: list[object] = [{}, {"_class_name": "P"}, {"a": []}, ["vae"], "text", None]
    assert [named_components(other) for other in others] == [{}] * len(others)


def test_a_pipeline_without_oddities_is_taken_whole() -> None:
    found = sort(WHOLE)
    assert found == SortedFiles(
        (f"unet/{PLAIN}",),
        None,
        tuple(sorted({*WHOLE, "model_index.json"} - {f"unet/{PLAIN}"})),
        {},
        {},
        ("text_encoder",),
    )


# What lies beside `WHOLE`, and why it stays behind.
LEFT = {
    f"unet/{FP16}": "would stay unfused",
    "unet/diffusion_pytorch_model.non_ema.safetensors": "would stay unfused",
    "unet/ema.safetensors": "would stay unfused",
    "unet/ema/model.safetensors": "would stay unfused",
    "unet/UPPER.SAFETENSORS": "would stay unfused",
    "unet/weights.sft": "would stay unfused",
    "unet/diffusion_pytorch_model.bin": "a pickle",
    "flux1-dev.safetensors": "beside the components",
    "pytorch_lora_weights.safetensors": "beside the components",
    f"vae/{FP16}": "without `variant`",
    "vae/diffusion_pytorch_model.fp16.bin": "a pickle",
    "vae/flax_model.msgpack": "another framework",
    "vae/pytorch_model.bin.index.json": "an index of weights",
    "vae/flax_model.msgpack.index.json": "an index of weights",
    f"transformer_ema/{PLAIN}": "does not name",
    "assets/picture.png": "does not name",
    "picture.png": "for people",
    "vae/notes.md": "for people",
    "README.md": "a model card",
    ".gitattributes": "hidden",
    "unet/.ipynb_checkpoints/config.json": "hidden",
    "pipeline.py": "nothing in the base asks for",
    "tokenizer/tokenization.py": "nothing in the base asks for",
    "vae/x.dat": "of no kind",
    "merges_and_more": "of no kind",
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_behind_has_a_reason_and_changes_nothing_else(name: str) -> None:
    found, plain = sort([*WHOLE, name]), sort(WHOLE)
    assert list(found.left) == [name]
    assert LEFT[name] in found.left[name]
    assert (found.shards, found.others) == (plain.shards, plain.others)


TAKEN = (
    "LICENSE", "LICENSE.md", "License.pdf", "NOTICE", "NOTICE.txt", "COPYING", "MODEL_LICENSE", "use_policy.md",
    "THIRD-PARTY-NOTICES.txt", "vae/LICENSE", "scheduler_config.json", "tokenizer/vocab.tiktoken", "tokenizer/b.vocab",
    "tokenizer/merges", "tokenizer/merges.txt", "tokenizer/spiece.model", "tokenizer/tokenizer.model.v3",
    "tokenizer/source.spm", "tokenizer/vocab.bpe", "tokenizer/dict.codes", "tokenizer/chat_template.jinja",
    "tokenizer/additional_chat_templates/tool.jinja", "tokenizer/bpe_simple_vocab_16e6.txt.gz", "vae/sub/config.json",
)  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_licences_and_what_a_library_loads_are_taken_over(name: str) -> None:
    found = sort([*WHOLE, name])
    assert name in found.others
    assert found.left == {}


def test_every_vocabulary_of_transformers_is_taken_over() -> None:
    """The names are those in `VOCAB_FILES_NAMES` of its sources: half of the modules need libraries to be imported."""
    found = find_spec("transformers")
    assert found is not None
    assert found.origin is not None
    names = set()
    for path in Path(found.origin).parent.glob("models/*/tokenization_*.py"):
        text = path.read_text(encoding="utf-8")
        for table in re.findall(r"^VOCAB_FILES_NAMES = (\{.*?\})", text, re.MULTILINE | re.DOTALL):
            names |= set(re.findall(r':\s*"([^"]+)"', table))
    assert {"vocab.json", "merges.txt", "spiece.model"} <= names
    assert [name for name in names if role_of(name).role is not Role.TEXT] == []


# Files of the component to fuse, in a folder of their own: the shards, then their index.
SETS: dict[str, tuple[list[str], list[str], str | None]] = {
    "one file of any name": (["m.safetensors"], ["m.safetensors"], None),
    "one file of any ending": (["m.SFT"], ["m.SFT"], None),
    "shards": ([*parts("diffusion_pytorch_model", 2), INDEX], parts("diffusion_pytorch_model", 2), INDEX),
    "diffusers loads shards first": (
        [PLAIN, *parts("diffusion_pytorch_model", 2), INDEX],
        parts("diffusion_pytorch_model", 2),
        INDEX,
    ),
    "transformers loads one file first": (
        ["model.safetensors", *parts("model", 2), "model.safetensors.index.json"],
        ["model.safetensors"],
        None,
    ),
    "plain before a variant": ([FP16, PLAIN], [PLAIN], None),
    "plain of another name before a variant": ([FP16, "m.safetensors"], ["m.safetensors"], None),
    "the loader's name before others": (["a.safetensors", PLAIN, "z.safetensors"], [PLAIN], None),
    "a variant alone": ([FP16], [FP16], None),
    "a variant's shards": (
        [*parts("diffusion_pytorch_model.fp16", 2), f"{PLAIN}.index.fp16.json"],
        parts("diffusion_pytorch_model.fp16", 2),
        f"{PLAIN}.index.fp16.json",
    ),
    "a variant's shards, as they were named": (
        [*(f"{part[:-12]}.fp16.safetensors" for part in parts("model", 2)), "model.safetensors.index.fp16.json"],
        [f"{part[:-12]}.fp16.safetensors" for part in parts("model", 2)],
        "model.safetensors.index.fp16.json",
    ),
    "an index of another name": (
        ["a.safetensors", "b.safetensors", "x.safetensors.index.json"],
        ["a.safetensors", "b.safetensors"],
        "x.safetensors.index.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SETS)
def test_the_weights_are_those_that_a_library_loads(kind: str) -> None:
    files, shards, index = SETS[kind]
    contents: dict[str, object] = {} if index is None else {index.removesuffix(".json"): index_of(shards)}
    found = sort(["config.json", *files], "", contents)
    assert (found.shards, found.index) == (tuple(shards), index)
    assert set(found.others) == {"config.json", *([index] if index else [])}
    assert found.left.keys() == set(files) - {*shards, index}
    assert found.variants == ({"": "fp16"} if "variant's" in kind or kind == "a variant alone" else {})


REFUSED: dict[str, tuple[list[str], dict[str, object], str]] = {
    "two of no name": (["a.safetensors", "b.safetensors"], {}, "2 safetensors files and no index (a.safetensors, …)"),
    "two variants": ([FP16, FP16.replace("fp16", "bf16")], {}, "only as the variants bf16, fp16; keep one"),
    "shards without an index": (parts("model", 2), {}, "2 safetensors files and no index"),
    "a shard that is gone": (
        [parts("m", 2)[0], "m.safetensors.index.json"],
        {"m.safetensors.index": index_of(parts("m", 2))},
        "has no m-00002-of-00002.safetensors, which its m.safetensors.index.json names",
    ),
    "an index of pickles": (["m.safetensors", INDEX], {INDEX[:-5]: index_of(["m.bin"])}, "'m.bin', which is a pickle"),
    "an index that leads away": (
        ["m.safetensors", INDEX],
        {INDEX[:-5]: index_of(["../m.safetensors"])},
        "which is not a safetensors file beside",
    ),
    "an index without a map": (["m.safetensors", INDEX], {INDEX[:-5]: {"weight_map": []}}, "has no weight_map"),
    "pickles": (["pytorch_model.bin"], {}, "weights only as pickles (pytorch_model.bin)"),
    "nothing": ([], {}, "no safetensors weights"),
    "another framework": (
        ["model-Q4.gguf"],
        {},
        "has its weights as model-Q4.gguf only; name that file itself as the base",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_weights_that_cannot_be_chosen_are_refused(kind: str) -> None:
    files, contents, said = REFUSED[kind]
    with pytest.raises(BadSource) as caught:
        sort(["config.json", *files], "", contents)
    assert said in str(caught.value)


def test_a_component_of_pickles_alone_is_refused_and_its_class_named() -> None:
    with pytest.raises(
        BadSource, match=r"text_encoder/ of here .*pickles .*transformers\.CLIPTextModel\.from_pretrained"
    ):
        sort([*WHOLE, "text_encoder/config.json", "text_encoder/pytorch_model.bin"])
    sort([*WHOLE, "tokenizer/cache.bin"])  # no model
    sort([*WHOLE, "config.json", "whole-model.ckpt"])  # no component


def test_a_component_of_which_nothing_would_be_taken_is_refused() -> None:
    others = [name for name in WHOLE if not name.startswith("tokenizer/")]
    with pytest.raises(
        BadSource, match=r"tokenizer/ of here, .*has no file that is taken \(tokenizer/words\.xyz: of no"
    ):
        sort([*others, "tokenizer/words.xyz"])
    assert "tokenizer/words.xyz" in sort([*others, "tokenizer/words.xyz", "tokenizer/vocab.json"]).left


def test_a_component_that_loads_without_a_variant_only_from_a_pickle_is_refused() -> None:
    encoder = ["text_encoder/config.json", "text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors"]
    with pytest.raises(BadSource, match=r"text_encoder/ of here has weights only as pickles"):
        sort([*WHOLE, *encoder])
    as_variant = [name for name in WHOLE if name != f"unet/{PLAIN}"] + [f"unet/{FP16}"]
    assert "text_encoder/model.fp16.safetensors" in sort([*as_variant, *encoder]).others
    assert sort([*WHOLE, *encoder, "text_encoder/model.safetensors"]).variants == {}


def test_the_variant_of_the_fused_component_is_taken_of_the_others_too() -> None:
    found = sort(["unet/config.json", f"unet/{FP16}", "vae/config.json", f"vae/{PLAIN}", f"vae/{FP16}"])
    assert found.shards == (f"unet/{FP16}",)
    assert f"vae/{FP16}" in found.others
    assert found.variants == {"unet": "fp16", "vae": "fp16"}
    assert "(fp16 of unet, fp16 of vae)" in found.remarks[0]
    assert "the variant is taken that the fused component has" in found.left[f"vae/{PLAIN}"]


# Code that the base asks for: where, by what, and the file.
CODE: dict[str, tuple[dict[str, object], str]] = {
    "a component's module": ({"model_index": {**PAIRS, "tokenizer": ["own", "T"]}}, "tokenizer/own.py"),
    "the pipeline's module": ({"model_index": {**PAIRS, "_class_name": ["own", "P"]}}, "own.py"),
    "a class of transformers": (
        {"tokenizer_config": {"auto_map": {"AutoTokenizer": ["own.T", None]}}},
        "tokenizer/own.py",
    ),
}


@pytest.mark.parametrize("kind", CODE)
def test_code_that_the_base_asks_for_is_taken_with_what_lies_beside_it(kind: str) -> None:
    contents, name = CODE[kind]
    beside = name.replace("own", "helper")
    names = [*WHOLE, "tokenizer/tokenizer_config.json", name, beside]
    assert {name, beside} <= set(sort(names, contents=contents).others)
    assert {name, beside} == sort(names).left.keys()
    assert name in sort(names, contents=contents).remarks[0]
    assert "trusts remote code" in sort(names, contents=contents).remarks[0]
    assert sort(names).remarks == []


def test_onnx_is_taken_where_a_component_has_nothing_else() -> None:
    assert "vae/model.onnx" in sort([name for name in WHOLE if name != f"vae/{PLAIN}"] + ["vae/model.onnx"]).others
    assert "vae/model.onnx" in sort([*WHOLE, "vae/model.onnx"]).left


def test_a_model_index_that_is_not_here_yet_names_every_folder() -> None:
    names = ["unet/a.safetensors", "x/model.safetensors", f"vae/{PLAIN}", f"vae/{FP16}"]
    found = sort_files(names, "unet", label="here", read=lambda _: None, fail=BadSource)
    assert {*found.shards, *found.others} == {*names} - {f"vae/{FP16}"}


POOL = [
    *WHOLE,
    *LEFT,
    *TAKEN,
    *(f"vae/{part}" for part in parts("diffusion_pytorch_model", 2)),
    "text_encoder/config.json",
]


@settings(max_examples=60)
@given(st.sets(st.sampled_from(POOL)))
def test_every_file_has_one_verdict_and_what_is_taken_would_be_taken_again(more: set[str]) -> None:
    """So a lock, which lists what was taken, and a merge are sorted as the base was."""
    found = sort({*WHOLE, *more})
    taken = {*found.shards, *found.others}
    assert taken | found.left.keys() == {*WHOLE, *more, "model_index.json"}
    assert not taken & found.left.keys()
    again = sort(taken - {"model_index.json"})
    assert (again.shards, again.others, again.left) == (found.shards, found.others, {})


def test_a_line_for_each_reason_names_the_first_files() -> None:
    names = [f"{number}.bin" for number in range(repository_files.SHOWN + 2)]
    lines = left_behind({**dict.fromkeys(names, "a pickle"), "x.png": "for people"})
    assert lines == [f"left behind: {', '.join(names[:-2])} and 2 more (a pickle)", "left behind: x.png (for people)"]
    assert json.dumps(lines)
