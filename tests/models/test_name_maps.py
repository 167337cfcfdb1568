"""Laws of name maps: they are what diffusers' converters make today, reach a whole model, give no name two meanings."""

import json
from collections import Counter

import pytest

from lora_fuse.models import Family, families
from lora_fuse.models.name_maps import NameMap, RowRun, maps, path_of
from lora_fuse.verification.other_names import OtherNames
from tests.support.derived_names import text_of
from tests.support.original_names import FAMILY_OF, family_of
from tests.tiny_models import tiny_transformer

WITH_MAP = [family for family in families() if family.originals and family.converter]


@pytest.mark.parametrize("family", WITH_MAP, ids=lambda family: family.name)
def test_the_map_in_the_package_is_the_one_that_is_derived(family: Family) -> None:
    text = path_of(str(family.converter)).read_text(encoding="utf-8")
    assert text == text_of(family), "python -m tests.support.derived_names"


@pytest.mark.parametrize("name", FAMILY_OF)
def test_every_parameter_of_the_model_is_reached(name: str) -> None:
    pieces = json.loads(path_of(str(family_of(name).converter)).read_text(encoding="utf-8"))["pieces"]
    reached = {piece[0] for parts in pieces.values() for piece in parts}
    names = {".".join("{}" if part.isdigit() else part for part in key.split(".")) for key in reached}
    for parameter in tiny_transformer(name).state_dict():
        assert ".".join("{}" if part.isdigit() else part for part in parameter.split(".")) in names


@pytest.mark.parametrize("family", WITH_MAP, ids=lambda family: family.name)
def test_a_name_that_is_in_both_spellings_is_the_same_parameter(family: Family) -> None:
    """Then a name that the base has never means another of its parameters."""
    pieces = json.loads(path_of(str(family.converter)).read_text(encoding="utf-8"))["pieces"]
    theirs = {piece[0] for parts in pieces.values() for piece in parts}
    for name in theirs & pieces.keys():
        assert pieces[name] == [[name, 0, 1]]
    for spelling in (theirs, pieces.keys()):
        assert max(Counter(name.replace(".", "_") for name in spelling).values()) == 1


def known(name: str) -> NameMap:
    (one,) = (one for one in maps() if one.family == name)
    return one


def test_a_name_of_many_numbers_is_no_work() -> None:
    """Each might be a block's: of 20,000 numbers the names alone would have 10^9 characters."""
    name = f"single_blocks.3.linear1.weight{'.1' * 20_000}"
    rows = {"single_transformer_blocks.3.proj_mlp.weight": 16}
    assert not any(one.knows(name) or one.translate(name.replace(".", "_"), rows) for one in maps())
    assert OtherNames(rows).find([name]) is None


def test_many_blocks_of_a_base_are_no_work_for_the_verification() -> None:
    names = OtherNames({f"blocks.{number}.attn.weight": 4 for number in range(100_000)})
    assert names.find(["single_blocks.3.linear1.weight"]) is None


def test_rows_are_cut_joined_and_swapped() -> None:
    heads = {f"single_transformer_blocks.3.attn.to_{part}.weight": 4 for part in "qkv"}
    split = known("FLUX.1").translate(
        "single_blocks.3.linear1.weight", heads | {"single_transformer_blocks.3.proj_mlp.weight": 16}
    )
    assert split is not None
    assert split["single_transformer_blocks.3.proj_mlp.weight"] == (RowRun(0, 12, 16),)
    joined = known("FLUX.1").translate(
        "single_transformer_blocks.3.proj_mlp.weight", {"single_blocks.3.linear1.weight": 28}
    )
    assert joined == {"single_blocks.3.linear1.weight": (RowRun(12, 0, 16),)}
    swapped = known("FLUX.2").translate("final_layer.adaLN_modulation.1.weight", {"norm_out.linear.weight": 10})
    assert swapped == {"norm_out.linear.weight": (RowRun(0, 5, 5), RowRun(5, 0, 5))}
    assert known("Wan 2.1").knows("blocks.3.cross_attn.k_img.weight")
    assert not known("Wan 2.2").knows("blocks.3.cross_attn.k_img.weight")


def test_rows_that_are_no_multiple_of_the_shares_are_refused() -> None:
    with pytest.raises(ValueError, match=r"linear1\.weight has 27 rows, which are to be cut 1:1:1:4"):
        known("FLUX.1").translate("single_transformer_blocks.3.proj_mlp.weight", {"single_blocks.3.linear1.weight": 27})
    assert known("FLUX.1").translate("single_blocks.3.linear1.weight", {}) is None
