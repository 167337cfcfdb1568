"""A LoRA's strength: every place that states it, alone, beside one that disagrees, and in unknown words."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftConfig, get_peft_model

from lora_fuse.cli import main
from lora_fuse.errors import BadLora, ShapeMismatch
from lora_fuse.lora import LoraFile, open_lora
from lora_fuse.lora.peft_fields import DEFAULT_ALPHA, FIELDS
from tests.support import tiny
from tests.support.key_styles import STYLES, Tensors, restyled

RANK = 4  # of the tiny LoRA
Header = dict[str, str]


def opened(folder: Path, tensors: Tensors, header: Header, name: str = "l.safetensors") -> LoraFile:
    return open_lora(tiny.write_lora(folder / name, tensors, header))


def packed(fields: Mapping[str, Any], component: str = "transformer") -> Header:
    return {"lora_adapter_metadata": json.dumps({f"{component}.{key}": value for key, value in fields.items()})}


def test_more_places_than_a_file_has_are_refused(tmp_path: Path) -> None:
    """Each is asked about each module."""
    many = {f"transformer.c{number}.r": 4 for number in range(101)}
    header = {"lora_adapter_metadata": json.dumps(many)}
    with pytest.raises(BadLora, match=r"101 places or components state a strength, and at most 100"):
        opened(tmp_path, restyled("diffusers", None), header)


ALONE: list[tuple[str, Header, float, str]] = [
    ("diffusers", {"alpha": "1", "rank": "4"}, 1 / 4, "header alpha, rank"),
    ("diffusers", {"alpha": "1"}, 1 / 4, "header alpha"),
    ("bare", {"lora_alpha": "6"}, 6 / 4, "header lora_alpha"),
    ("lightning", {"network_alpha": "2", "network_dim": "4"}, 2 / 4, "header network_alpha, network_dim"),
    ("diffusers", {"transformer.lora_alpha": "64", "transformer.r": "4"}, 16, "header transformer.lora_alpha"),
    (
        "diffusers",
        {"transformer.lora_alpha": "6", "transformer.target_modules": '["to_q"]'},
        6 / 4,
        "header transformer",
    ),
    ("bare", {"unet.lora_alpha": "2", "unet.use_rslora": "True"}, 2 / 2, "header unet.lora_alpha, unet.use_rslora"),
    ("kohya", {"ss_network_alpha": "1", "ss_network_dim": "4"}, 1 / 4, "header ss_network_alpha"),
    ("diffusers", {"ss_network_alpha": "4.0", "ss_network_dim": "4"}, 1, "header ss_network_alpha"),
    ("diffusers", packed({"r": 4, "lora_alpha": 2}), 2 / 4, "header lora_adapter_metadata (transformer)"),
    ("bare", packed({"r": 4, "lora_alpha": 2}, "unet"), 2 / 4, "header lora_adapter_metadata (unet)"),
    ("bare", packed({"lora_alpha": 2, "use_rslora": True}, "x"), 2 / 2, "header lora_adapter_metadata (x)"),
    ("bare", packed({"r": 4}), 8 / 4, "the default of header lora_adapter_metadata (transformer)"),  # PEFT's own
    ("lightning", {"alpha": "6", **packed({"r": 4})}, 6 / 4, "header alpha"),
    (
        "bare",
        packed({"r": 4, "lora_alpha": 2}) | {"text_encoder.lora_alpha": "9"},
        2 / 4,
        "header lora_adapter_metadata",
    ),
    ("bare", {"lora_config": json.dumps({"r": 4, "lora_alpha": 12})}, 12 / 4, "header lora_config"),
    ("diffusers", {"format": "pt", "author": "me", "ss_network_module": "networks.lora"}, 1, "nowhere: alpha = rank"),
]


@pytest.mark.parametrize(("style", "header", "factor", "place"), ALONE, ids=lambda value: str(value)[:40])
def test_one_place_that_states_it_is_enough(
    tmp_path: Path, style: str, header: Header, factor: float, place: str
) -> None:
    deltas = opened(tmp_path, restyled(style, None), header).deltas
    assert {delta.factor for delta in deltas} == {factor}
    assert all(delta.said_by.startswith(place) for delta in deltas)


@pytest.mark.parametrize(
    ("header", "both"),
    [
        ({"alpha": "8"}, r"\.alpha gives .* alpha 2 \(factor 0\.5\), and header alpha alpha 8 \(factor 2\)"),
        ({"ss_network_alpha": "1", "ss_network_dim": "4"}, r"alpha 2 .*header ss_network_alpha alpha 1 "),
        (packed({"r": 4, "lora_alpha": 12}), r"alpha 2 .*\(transformer\) alpha 12 \(factor 3\)"),
        (packed({"r": 4, "lora_alpha": 2, "use_rslora": True}), r"factor 0\.5.*alpha 2 \(factor 1\)"),
        (
            {"ss_network_alpha": "1", "ss_network_dim": "4", "ss_network_args": '{"loraplus_lr_ratio": "4"}'},
            r"alpha 2 .*header ss_network_alpha alpha 1 ",
        ),
        ({"alpha": "2", "lora_alpha": "3"}, "its header says alpha 2 and lora_alpha 3"),
        ({"alpha": "2", **packed({"r": 4, "lora_alpha": 4})}, r"alpha 2 .*alpha 4 "),
    ],
    ids=str,
)
def test_two_places_that_disagree_are_refused_with_both_values(tmp_path: Path, header: Header, both: str) -> None:
    with pytest.raises(BadLora, match=both):
        opened(tmp_path, tiny.lora_tensors(alpha=2.0), header)


@pytest.mark.parametrize(
    "header",
    [
        {"alpha": "2", "rank": "4"},
        packed({"r": 4, "lora_alpha": 2}),
        {"ss_network_alpha": "1", "ss_network_dim": "16"},  # the default of a run that gave these modules another rank
        {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"},
        {"ss_network_alpha": "1", "ss_network_dim": "4", "ss_network_args": '{"algo": "locon", "rs_lora": "True"}'},
    ],
    ids=str,
)
def test_places_that_agree_or_are_about_others_are_no_trouble(tmp_path: Path, header: Header) -> None:
    deltas = opened(tmp_path, tiny.lora_tensors(alpha=2.0), header).deltas
    assert {(delta.factor, delta.said_by) for delta in deltas} == {(0.5, ".alpha")}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"alpha": "eight"}, r"header alpha is 'eight', not a positive number"),
        ({"alpha": "nan"}, r"header alpha is 'nan'"),
        ({"alpha": "0"}, r"header alpha is '0'"),
        ({"lora_scale": "0.5"}, r"header lora_scale is '0\.5', and 'scale' speaks of strength"),
        ({"trainerMultiplier": "2"}, "header trainerMultiplier is '2', and 'multiplier'"),
        ({"adapter": '{"scaling": 3}'}, "'scaling' speaks of strength"),
        ({"adapter_type": "oft"}, r"header adapter_type is 'oft'; merged here are lora, "),
        ({"init_lora_weights": "pissa"}, "header init_lora_weights sets init_lora_weights='pissa'"),
        (packed({"init_lora_weights": "olora"}, "unet"), "sets init_lora_weights='olora'.* changes the base"),
        (packed({"use_dora": True}), "sets use_dora=True, and the file has no tensors of it"),
        ({"lora_adapter_metadata": "[1]"}, "header lora_adapter_metadata is not a PEFT configuration: it holds a list"),
        ({"unet.use_rslora": "True"}, "header unet.use_rslora says use_rslora and no alpha that it is about"),
        (packed({"use_rslora": "yes"}), "use_rslora is 'yes', not true or false"),
        ({"ss_network_alpha": "1", "ss_network_dim": "4"}, "a converter may have multiplied it in"),
        ({**packed({"r": 4}, "transformer_2"), "unet.r": "4"}, "header speaks of .*transformer_2.* and header unet"),
    ],
    ids=str,
)
def test_words_that_are_not_understood_are_refused(tmp_path: Path, header: Header, said: str) -> None:
    with pytest.raises(BadLora, match=said):
        opened(tmp_path, restyled("bare", None), header)


def test_a_rank_that_the_header_denies_is_refused(tmp_path: Path) -> None:
    for header in ({"alpha": "8", "rank": "128"}, {"ss_network_alpha": "1", "ss_network_dim": "8"}):
        with pytest.raises(ShapeMismatch, match=r"have rank 4, and header .* says (128|8)"):
            opened(tmp_path, restyled("lightning", None), header)


def test_patterns_for_dotted_names_are_not_lost_on_flattened_ones(tmp_path: Path) -> None:
    header = packed({"r": 4, "lora_alpha": 4, "alpha_pattern": {"attn.to_q": 8}})
    with pytest.raises(BadLora, match="patterns for names with dots"):
        opened(tmp_path, restyled("kohya", None), header)
    anchored = packed({"r": 4, "lora_alpha": 4, "alpha_pattern": {"^transformer_blocks.0.attn.to_q": 8}})
    deltas = opened(tmp_path, restyled("diffusers", None), anchored).deltas
    assert {delta.module for delta in deltas if delta.factor == 2} == {"transformer.transformer_blocks.0.attn.to_q"}


def test_a_configuration_beside_the_file_counts_if_it_is_not_anothers(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 12}))
    tensors = restyled("peft", None)
    for name in ("l.safetensors", "adapter_model.safetensors"):
        lora = opened(tmp_path, tensors, {}, name)
        assert {(delta.factor, delta.said_by) for delta in lora.deltas} == {(3.0, "adapter_config.json")}
        assert lora.config_sha256 is not None
    other = open_lora(tmp_path / "l.safetensors")  # now beside PEFT's own file
    assert {delta.factor for delta in other.deltas} == {1.0}
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(BadLora, match=r"adapter_config\.json, which says its alpha, is not beside it"):
        open_lora(tmp_path / "adapter_model.safetensors")


def test_the_list_of_fields_is_pefts_own() -> None:
    theirs = {field.name: field for field in dataclasses.fields(LoraConfig)}
    assert set(FIELDS) == set(theirs)
    assert {field.name for field in dataclasses.fields(PeftConfig)} <= set(FIELDS)
    assert theirs["lora_alpha"].default == DEFAULT_ALPHA


@pytest.mark.filterwarnings("ignore:lora with eva initialization used")  # asks for less memory
@pytest.mark.parametrize("kind", [True, "gaussian", "eva", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora"])
def test_a_kind_that_changes_the_base_is_refused_and_no_other(tmp_path: Path, kind: bool | str) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8, bias=False)
    net = torch.nn.Sequential()
    net.add_module("to_q", layer)
    before = layer.weight.detach().clone()
    more = {"eva_config": EvaConfig()} if kind == "eva" else {}
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=kind, **more))
    model.save_pretrained(tmp_path)
    changes = not torch.equal(layer.weight, before)
    assert changes == (kind in {"pissa", "pissa_niter_4", "olora"})
    if changes:
        with pytest.raises(BadLora, match=f"init_lora_weights='{kind}'"):
            open_lora(tmp_path)
    else:
        assert [delta.module for delta in open_lora(tmp_path).deltas] == ["base_model.model.to_q"]


REFUSED_FIELDS = {
    "init_lora_weights": "corda", "loftq_config": {"loftq_bits": 4}, "layer_replication": [[0, 4]], "bias": "all",
    "modules_to_save": ["proj_out"], "target_parameters": ["w"], "trainable_token_indices": [1], "use_qalora": True,
    "alora_invocation_tokens": [1], "fan_in_fan_out": True, "kasa_config": {"beta": 1}, "peft_type": "LOHA",
    "of_a_newer_peft": True,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_a_field_that_cannot_be_merged_is_refused_by_name_and_value(tmp_path: Path, name: str) -> None:
    tiny.write_lora(tmp_path / "adapter_model.safetensors", restyled("peft", None))
    value = REFUSED_FIELDS[name]
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"r": 4, "lora_alpha": 6, name: value}))
    with pytest.raises(BadLora) as refusal:
        open_lora(tmp_path)
    assert f"adapter_config.json sets {name}={value!r}, which" in str(refusal.value)
    config.write_text(json.dumps({"r": 4, "lora_alpha": 6, "of_a_newer_peft": None, "also": False, "task_type": "X"}))
    assert {delta.factor for delta in open_lora(tmp_path).deltas} == {1.5}


def test_inspect_shows_for_every_module_the_factor_and_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write_lora(tmp_path / "l.safetensors", restyled("bare", None), {"alpha": "1", "author": "me"})
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "transformer_blocks.0.attn.to_q.weight  24x16  factor 0.25 (alpha 1, header alpha)" in shown
    assert "header entries that say nothing known: author" in shown


@pytest.mark.parametrize("style", STYLES)
def test_a_missing_alpha_is_noticed_where_trainers_write_one(tmp_path: Path, style: str) -> None:
    down, _ = STYLES[style]
    expected = {RANK: 1.0} if "lora_down" in down else {RANK: 8.0} if down.startswith("base_model.") else {}
    assert opened(tmp_path, restyled(style, None), {}).missing_alphas == expected
    assert opened(tmp_path, restyled(style, 2.0), {}).missing_alphas == {}


def test_a_missing_alpha_is_warned_of_with_the_factor_that_it_would_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, factor in (("Qwen-Image-2512-Lightning-4steps-V1.0-bf16", "2"), ("mine", "0.25")):
        path = tiny.write_lora(tmp_path / f"{name}.safetensors", tiny.lora_tensors(alpha=None))
        assert main(["inspect", str(path)]) == 0
        assert f"warning: {name}.safetensors: no alpha is said" in (said := capsys.readouterr().err)
        assert f"it would be {factor}: then use that as the scale" in said
