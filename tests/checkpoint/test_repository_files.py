"""What of a pipeline repository is taken, from names alone."""

import pytest

from lora_fuse.checkpoint.repository_files import (
    components,
    indexed_weights,
    is_index,
    is_pickle,
    single_weights,
    text_files,
)
from lora_fuse.errors import BadSource

INDEX = "unet/model.safetensors.index.json"


def test_pickles_are_known_by_their_suffix_in_any_case() -> None:
    assert all(map(is_pickle, ("a/b.bin", "x.PT", "x.ckpt", "x.pkl", "x.pickle", "x.pth")))
    assert not any(map(is_pickle, ("a.safetensors", "bin/a.json", "config.json")))


def test_components_are_the_pairs_that_are_not_null() -> None:
    index = {"_class_name": "P", "vae": ["diffusers", "V"], "checker": [None, None], "flag": True, "_x": ["a", "b"]}
    assert components(index, "here") == ["vae"]


@pytest.mark.parametrize("content", [{}, {"_class_name": "P"}, ["vae"], "text", None])
def test_an_index_without_components_is_refused(content: object) -> None:
    with pytest.raises(BadSource, match=r"model_index\.json of here names no component"):
        components(content, "here")


def test_texts_are_taken_and_other_indexes_and_folders_are_not() -> None:
    taken = ["t/chat.jinja", "t/config.json", "t/merges.txt", "t/model.safetensors.index.json", "t/spiece.model"]
    left = [
        "t/model.fp16.safetensors.index.json",
        "t/model.safetensors.index.fp16.json",
        "t/pytorch_model.bin.index.json",
        "t/flax_model.msgpack.index.json",
        "t/code.py",
        "t/model.onnx",
        "t/sub/config.json",
        "u/config.json",
        "README.md",
    ]
    assert text_files("t", [*left, *taken], "here") == taken


def test_a_component_without_a_folder_is_refused() -> None:
    with pytest.raises(BadSource, match=r"here has no folder vae/"):
        text_files("vae", ["unet/config.json"], "here")


def test_only_the_plain_safetensors_index_is_one() -> None:
    assert is_index(INDEX)
    assert not is_index("unet/model.fp16.safetensors.index.json")
    assert not is_index("unet/pytorch_model.bin.index.json")


def test_an_index_gives_its_shards_once_each() -> None:
    content = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}
    names = ["unet/m-1.safetensors", "unet/m-2.safetensors", "unet/m-3.safetensors"]
    assert indexed_weights(INDEX, content, names, "here") == names[:2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, "here has no unet/gone.safetensors"),
        ({"weight_map": {"a": "m.bin"}}, "'m.bin', which is a pickle"),
        (
            {"weight_map": {"a": "../vae/m.safetensors"}},
            "'../vae/m.safetensors', which is not a safetensors file beside",
        ),
        ({"weight_map": {"a": "m.fp16.safetensors"}}, "'m.fp16.safetensors', which is not"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["m.safetensors"]}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(content: object, said: str) -> None:
    with pytest.raises(BadSource) as caught:
        indexed_weights(INDEX, content, ["unet/m.bin", "vae/m.safetensors", "unet/m.fp16.safetensors"], "here")
    assert said in str(caught.value)


def test_without_an_index_the_one_plain_file_is_taken() -> None:
    names = ["vae/m.safetensors", "vae/m.fp16.safetensors", "vae/m.bin", "unet/m.safetensors"]
    assert single_weights("vae", names, "here") == ["vae/m.safetensors"]
    assert single_weights("scheduler", ["scheduler/config.json"], "here") == []


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["vae/m.bin", "vae/config.json"], "weights only as pickles (vae/m.bin)"),
        (["vae/m.fp16.safetensors"], "weights only as a variant (vae/m.fp16.safetensors)"),
        (["vae/m-1.safetensors", "vae/m-2.safetensors"], "2 safetensors files and no index"),
    ],
)
def test_weights_that_cannot_be_chosen_are_refused(names: list[str], said: str) -> None:
    with pytest.raises(BadSource) as caught:
        single_weights("vae", names, "here")
    assert said in str(caught.value)
