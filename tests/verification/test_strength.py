"""Laws of strength and kind: verification reads them itself, wherever they are said, and an engine that does not fails.

The merges here are made by numpy, with the factor that an engine would have taken, right or wrong.
"""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_fuse.errors import BadLora
from lora_fuse.lora.inputs import LoraInput
from lora_fuse.verification import peft_reading
from lora_fuse.verification.expectation import ExpectedDelta
from lora_fuse.verification.rederivation import Expectation, Verification, verify_merge
from tests.support import tiny

Tensors = dict[str, npt.NDArray[Any]]
RANK = 4
NAMES = ("blocks.0.to_q", "blocks.0.to_k", "blocks.1.add_q")
RNG = np.random.default_rng(5)
BASE: Tensors = {f"{name}.weight": RNG.standard_normal((12, 8)).astype(np.float32) for name in NAMES}
DOWN = {name: RNG.standard_normal((RANK, 8)).astype(np.float32) for name in NAMES}
UP = {name: RNG.standard_normal((12, RANK)).astype(np.float32) for name in NAMES}
STYLES = {"peft": ("lora_A.weight", "lora_B.weight"), "kohya": ("lora_down.weight", "lora_up.weight")}
PEFT = {"peft_type": "LORA", "r": RANK, "lora_alpha": 1}


def adapter(style: str = "peft", prefix: str = "", alpha: float | None = None) -> Tensors:
    down, up = STYLES[style]
    made: Tensors = {f"{prefix}{name}.{down}": DOWN[name] for name in NAMES}
    made |= {f"{prefix}{name}.{up}": UP[name] for name in NAMES}
    return made | (
        {f"{prefix}{name}.alpha": np.array(alpha, np.float32) for name in NAMES} if alpha is not None else {}
    )


class Case:
    """A base, a LoRA and merges of them with any factor, by name or one for all."""

    def __init__(self, folder: Path, tensors: Tensors | None = None, metadata: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.base = tiny.write_component(folder / "base", BASE, 1)
        self.lora = tiny.write_lora(folder / "lora/adapter_model.safetensors", tensors or adapter(), metadata)

    def config(self, entries: object) -> "Case":
        (self.lora.parent / "adapter_config.json").write_text(json.dumps(entries))
        return self

    def verify(self, factor: float | dict[str, float], lora: Path | None = None) -> Verification:
        factors = factor if isinstance(factor, dict) else dict.fromkeys(NAMES, factor)
        merged: Tensors = {}
        for name in NAMES:
            wide = UP[name].astype(np.float64) @ DOWN[name].astype(np.float64)
            merged[f"{name}.weight"] = (BASE[f"{name}.weight"] + factors[name] * wide).astype(np.float32)
        out = tiny.write_component(self.folder / "out", merged, 1)
        given = [LoraInput("l", lora or self.lora, 1.0)]
        return verify_merge(out, self.base, given, component="", rows=4, expected=Expectation())


def header(**entries: object) -> str:
    return json.dumps(entries)


# Where the strength is said, and the factor that it means.
SAID: dict[str, tuple[Tensors, dict[str, str], float]] = {
    "nowhere": (adapter(), {"format": "pt"}, 1),
    "tensors": (adapter("kohya", alpha=2), {}, 0.5),
    "alpha": (adapter(prefix="transformer."), {"alpha": "1", "rank": "4"}, 0.25),
    "lora_alpha": (adapter(), {"lora_alpha": "2.0"}, 0.5),
    "network_alpha": (adapter("kohya"), {"network_alpha": "1"}, 0.25),
    "a component's entries": (adapter(prefix="unet."), {"unet.lora_alpha": "2", "unet.r": "4"}, 0.5),
    "rsLoRA in an entry": (adapter(), {"lora_alpha": "1", "use_rslora": "True"}, 0.5),
    "diffusers": (
        adapter(),
        {"lora_adapter_metadata": header(**{"transformer.lora_alpha": 1, "transformer.r": 4})},
        0.25,
    ),
    "another component": (adapter(), {"lora_adapter_metadata": header(**{"unet.lora_alpha": 1, "unet.r": 4})}, 0.25),
    "two components": (
        adapter(prefix="unet."),
        {"lora_adapter_metadata": header(**{"unet.lora_alpha": 1, "text_encoder.lora_alpha": 2})},
        0.25,
    ),
    "rsLoRA": (adapter(), {"lora_adapter_metadata": header(**{**PEFT, "use_rslora": True})}, 0.5),
    "PEFT's default": (adapter(), {"lora_adapter_metadata": header(r=4)}, 2),
    "a configuration in any entry": (adapter(), {"peft": header(**PEFT)}, 0.25),
    "kohya's run": (adapter("kohya"), {"ss_network_alpha": "1", "ss_network_dim": "4"}, 0.25),
    "kohya's run, another rank": (adapter("kohya", alpha=2), {"ss_network_alpha": "1", "ss_network_dim": "16"}, 0.5),
    "LyCORIS": (
        adapter("kohya", alpha=2),
        {"ss_network_alpha": "1", "ss_network_dim": "4", "ss_network_args": header(algo="locon", rs_lora="True")},
        0.5,
    ),
    "resized": (adapter("kohya", alpha=2), {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, 0.5),
    "all of them": (
        adapter("kohya", alpha=2),
        {"alpha": "2", "ss_network_alpha": "2", "ss_network_dim": "4", "lora_adapter_metadata": header(lora_alpha=2)},
        0.5,
    ),
}


@pytest.mark.parametrize("where", SAID)
def test_the_strength_is_read_where_it_is_said(tmp_path: Path, where: str) -> None:
    tensors, metadata, factor = SAID[where]
    case = Case(tmp_path, tensors, metadata or None)
    assert case.verify(factor).problems == []
    for wrong in {1.0, 0.25, factor * 2} - {factor}:  # an engine that overlooks it
        found = case.verify(wrong)
        assert found.problem_count == len(NAMES), wrong
        assert "not base + delta rounded once" in found.problems[0]


@pytest.mark.filterwarnings("ignore:The following alpha_pattern")  # PEFT's, of a pattern that is for no module
@pytest.mark.parametrize("installed", [True, False], ids=["PEFT", "without PEFT"])
@pytest.mark.parametrize(
    "more",
    [
        {"lora_alpha": 1},
        {"lora_alpha": 1, "use_rslora": True},
        {"lora_alpha": 1, "alpha_pattern": {"to_q|to_k": 3, "to_q": 5}},  # the first that matches, and whole names
        {"lora_alpha": 1, "alpha_pattern": {"^blocks.1.add_q": 3, "q": 7, "d_q": 9}},
    ],
)
def test_a_configuration_means_what_peft_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], installed: bool
) -> None:
    net = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.ModuleDict(), torch.nn.ModuleDict()])})
    for name in NAMES:
        layer = torch.nn.Linear(8, 12, bias=False)
        net.get_submodule(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], layer)
    LoraConfig(r=RANK, target_modules=["to_q", "to_k", "add_q"], **more).save_pretrained(tmp_path / "lora")
    model = get_peft_model(net, LoraConfig.from_pretrained(tmp_path / "lora"))
    factors = {name: model.get_submodule(f"base_model.model.{name}").scaling["default"] for name in NAMES}
    case = Case(tmp_path, adapter(prefix="base_model.model."))
    if not installed:
        monkeypatch.setitem(sys.modules, "peft", None)
    for given in (case.lora, case.lora.parent):  # the file that is named itself, and the folder
        assert case.verify(factors, given).problems == []
        assert case.verify(dict.fromkeys(NAMES, 1.0), given).problem_count == len(NAMES)


def test_a_pattern_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_reading, "SECONDS", 0.1)
    case = Case(tmp_path).config({**PEFT, "alpha_pattern": {"(.|.|.|.)+$o": 1}})
    with pytest.raises(BadLora, match=r"adapter_config\.json: its patterns take more than 0\.1 s"):
        case.verify(0.25)


def test_more_claims_than_a_file_has_are_a_problem(tmp_path: Path) -> None:
    many = header(**{f"c{number}.r": 4 for number in range(101)})
    case = Case(tmp_path, adapter(), {"lora_adapter_metadata": many})
    assert any("101 claims of strength, of which 100 are read" in problem for problem in case.verify(1).problems)


def test_a_tensor_larger_than_any_of_use_stays_unread(tmp_path: Path) -> None:
    """It may be as large as a sparse file: a hole of a disk, and all of the memory."""
    case = Case(tmp_path)
    numbers = 1 << 40
    text = header(**{"blocks.0.to_q.diff": {"dtype": "F16", "shape": [numbers, 1], "data_offsets": [0, 2 * numbers]}})
    with case.lora.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text.encode())
        file.truncate(8 + len(text) + 2 * numbers)
    assert any(f"diff has {numbers} numbers, and" in problem for problem in case.verify(1).problems)


def test_a_configuration_is_of_the_file_that_it_lies_beside(tmp_path: Path) -> None:
    case = Case(tmp_path).config(PEFT)
    other = tiny.write_lora(case.lora.parent / "other.safetensors", adapter())
    assert case.verify(1, other).problems == []  # it is adapter_model's
    case.lora.unlink()
    assert case.verify(0.25, other).problems == []
    assert not case.verify(1, other).passed


# Fields of a configuration, and what is said of them.
NOT_A_PRODUCT: dict[str, tuple[object, str]] = {
    **{name: ({"init_lora_weights": name}, f"init_lora_weights is '{name}'") for name in ("pissa", "olora", "corda")},
    **{name: ({"init_lora_weights": name}, f"init_lora_weights is '{name}'") for name in ("pissa_niter_4", "lora_ga")},
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    "peft_type": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "layer_replication": ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication is [[0, 1], [0, 1]]"),
    "target_parameters": ({"target_parameters": ["experts.up"]}, "target_parameters is ['experts.up']"),
    "trainable_token_indices": ({"trainable_token_indices": [1]}, "trainable_token_indices is [1]"),
    "modules_to_save": ({"modules_to_save": ["proj_out"]}, "modules_to_save is ['proj_out']"),
    "use_qalora": ({"use_qalora": True}, "use_qalora is True"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is [1, 2]"),
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "kasa": ({"kasa_config": {"beta": 0.1}}, "kasa_config is {'beta': 0.1}"),
    "of a newer PEFT": ({"use_something_new": True}, "use_something_new is True"),
    "DoRA": ({"use_dora": True}, "has no DoRA, and"),
    "lora_bias": ({"lora_bias": True}, "has no bias, and"),
    "rank": ({"r": 8}, "says 8"),
    "rank_pattern": ({"rank_pattern": {"to_q": 2}}, "says 2"),
    "no number": ({"lora_alpha": "many"}, "no configuration of a LoRA"),
    "no pattern": ({"alpha_pattern": {"(": 1}}, "no configuration of a LoRA"),
    "a pattern of copies": ({"alpha_pattern": {"(a{1000}){1000}": 1}}, "no configuration of a LoRA"),
    "what PEFT recurses on": ({"monteclora_config": {"to_q": "x"}}, "no configuration of a LoRA"),
    "no mapping": (["r", 4], "no configuration of a LoRA"),
}


@pytest.mark.parametrize("name", NOT_A_PRODUCT)
def test_a_configuration_that_says_more_than_factors_is_a_problem(tmp_path: Path, name: str) -> None:
    entries, words = NOT_A_PRODUCT[name]
    case = Case(tmp_path).config({**PEFT, **entries} if isinstance(entries, dict) else entries)
    assert any(words in text and "adapter_config.json" in text for text in case.verify(0.25).problems)


def test_every_field_of_peft_is_known_here() -> None:
    """A field that PEFT adds is read before it is put in one of the lists."""
    refused = {
        *("alora_invocation_tokens", "arrow_config", "corda_config", "ensure_weight_tying", "fan_in_fan_out"),
        *("kasa_config", "layer_replication", "loftq_config", "lora_ga_config", "megatron_config", "modules_to_save"),
        *("monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora"),
    }
    known = {*peft_reading.SILENT, *peft_reading.HARMLESS, *refused}
    assert {field.name for field in dataclasses.fields(LoraConfig)} == known
    defaults = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    assert {name: defaults[name] for name in ("r", "lora_alpha")} == {"r": 8, "lora_alpha": 8}


DISAGREEING: dict[str, tuple[Tensors, dict[str, str], tuple[str, ...]]] = {
    "tensors and header": (adapter("kohya", alpha=1), {"alpha": "2"}, ("alpha says 1", "says 2")),
    "header and configuration": (
        adapter(), {"alpha": "2", "lora_adapter_metadata": header(lora_alpha=1)}, ("says 2", "says 1")),
    "tensors and rsLoRA": (
        adapter("kohya", alpha=1), {"lora_adapter_metadata": header(**{**PEFT, "use_rslora": True})}, ("square root",)),
    "two entries": (adapter(), {"alpha": "2", "lora_alpha": "1"}, ("and another entry",)),
    "kohya's run": (adapter("kohya", alpha=1), {"ss_network_alpha": "2", "ss_network_dim": "4"}, ("ss_network_alpha",)),
    "kohya's run, arguments of the training": (
        adapter("kohya", alpha=1),
        {"ss_network_alpha": "2", "ss_network_dim": "4", "ss_network_args": header(loraplus_lr_ratio="4")},
        ("ss_network_alpha",)),
    "kohya's run, converted": (adapter(), {"ss_network_alpha": "1", "ss_network_dim": "4"}, ("whether the factors",)),
    "kohya's run, no number": (adapter(), {"ss_network_alpha": "x", "ss_network_dim": "4"}, ("no numbers",)),
    "dora_wd": (adapter("kohya", alpha=1), {"ss_network_args": header(dora_wd="True")}, ("no dora_scale",)),
    "the rank": (adapter(), {"rank": "16"}, ("rank 4", "says 16")),
    "infinity": (adapter("kohya", alpha=math.inf), {}, ("no strength",)),
    "a scale": (adapter(), {"lora_scale": "0.5"}, ("lora_scale", "0.5")),
    "a scale inside": (adapter(), {"settings": header(scale=0.5)}, ("settings", "scale")),
    "no JSON": (adapter(), {"lora_adapter_metadata": "{"}, ("lora_adapter_metadata",)),
    "no number": (adapter(), {"alpha": "many"}, ("many",)),
    "no number that a computer has": (adapter(), {"alpha": "1" + "0" * 400}, ("no configuration",)),
    "an endless rank": (adapter(), {"ss_network_alpha": "2", "ss_network_dim": "inf"}, ("no numbers",)),
    "no flag": (adapter(), {"use_rslora": "perhaps"}, ("perhaps",)),
    "components": (
        adapter(),
        {"lora_adapter_metadata": header(**{"unet.lora_alpha": 1, "transformer.lora_alpha": 1})},
        ("transformer, unet",)),
    "one key twice": ({**adapter(), **adapter("kohya")}, {}, ("means the same",)),
    "an unknown key": ({**adapter(), "blocks.0.to_q.oft_blocks": UP[NAMES[0]]}, {}, ("oft_blocks",)),
}  # fmt: skip


@pytest.mark.parametrize("name", DISAGREEING)
def test_two_places_that_disagree_and_what_nobody_understands_are_problems(tmp_path: Path, name: str) -> None:
    tensors, metadata, words = DISAGREEING[name]
    found = Case(tmp_path, tensors, metadata or None).verify(0.25)
    assert any(all(word in text for word in words) for text in found.problems), found.problems


def test_what_says_nothing_of_strength_is_no_problem(tmp_path: Path) -> None:
    told = {"format": "pt", "software": header(name="ai-toolkit"), "ss_scale_weight_norms": "1.0", "name": "x"}
    told |= {"ot_config": header(lora_alpha=3, peft_type="LORA"), "workflow": header(scale=1)}  # trainers' own settings
    told |= {"modelspec.title": "alpha", "ss_huber_scale": "1", "training_info": header(step=100)}
    assert Case(tmp_path, adapter(), told).verify(1).problems == []


def test_a_dora_that_the_configuration_denies_is_a_problem(tmp_path: Path) -> None:
    magnitudes = {f"{name}.lora_magnitude_vector": np.ones(12, np.float32) for name in NAMES}
    found = Case(tmp_path, {**adapter(), **magnitudes}).config({**PEFT, "use_dora": False}).verify(0.25)
    assert any("has a DoRA" in text and "says False" in text for text in found.problems)


def random(*shape: int) -> npt.NDArray[Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def derived(delta: ExpectedDelta, weight: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return delta.derive(len(weight), weight.__getitem__)(rows)


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 3, 2)], ids=["1d", "2d", "3d"])
def test_tucker_kernels_have_one_two_or_three_dimensions(kernel: tuple[int, ...]) -> None:
    """The right values are LyCORIS' own formulas, functional/general.py and loha.py."""
    ones = (1,) * len(kernel)
    up = random(6, 3)
    down = random(2, 4)
    core = random(3, 2, *kernel)
    lora = {"lora_mid": core, "up": up.reshape(6, 3, *ones), "down": down.reshape(2, 4, *ones)}
    wide = np.einsum("mn...,im,nj->ij...", *(part.astype(np.float64) for part in (core, up, down)))
    rows = np.array([0, 5])
    assert np.allclose(derived(ExpectedDelta(lora, 1.0, 1.0), up, rows), wide.reshape(6, -1)[rows], rtol=1e-12)

    def half(n: int, kind: str) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[Any]]:
        parts = {f"{kind}_w{n}_a": random(3, 6), f"{kind}_w{n}_b": random(2, 4), f"{kind}_t{n}": random(3, 2, *kernel)}
        a, b, t = (part.astype(np.float64) for part in parts.values())
        return parts, np.einsum("ij...,jr,ip->pr...", t, b, a).reshape(6, -1)

    (first, left), (second, right) = half(1, "hada"), half(2, "hada")
    loha = ExpectedDelta({**first, **second}, 1.0, 1.0)
    assert np.allclose(derived(loha, up, rows), (left * right)[rows], rtol=1e-12)
    parts, right = half(2, "lokr")
    whole = random(2, 3)
    lokr = ExpectedDelta({**parts, "lokr_w1": whole}, 1.0, 1.0)
    kron = np.kron(whole.astype(np.float64), right)
    assert np.allclose(derived(lokr, random(12, 6), np.arange(12)), kron, rtol=1e-12)


def test_a_square_dora_by_column_is_by_column() -> None:
    weight = random(8, 8)
    scale = np.abs(random(1, 8)) + 1
    change = random(8, 8)
    delta = ExpectedDelta({"diff": change, "dora": scale, "peft": np.array(False)}, 1.0, 1.0)
    moved = weight.astype(np.float64) + change
    right = scale * moved / np.linalg.norm(moved, axis=0, keepdims=True) - weight
    assert np.allclose(derived(delta, weight, np.arange(8)), right, rtol=1e-9)


def test_a_whole_bias_beside_a_lora_is_not_scaled(tmp_path: Path) -> None:
    base = {"x.weight": random(6, 4), "x.bias": random(6)}
    parts = {"x.lora_down.weight": random(2, 4), "x.lora_up.weight": random(6, 2), "x.alpha": np.array(1, np.float32)}
    whole = random(6)
    lora = tiny.write_lora(tmp_path / "l.safetensors", {**parts, "x.diff_b": whole})
    product = parts["x.lora_up.weight"].astype(np.float64) @ parts["x.lora_down.weight"].astype(np.float64)
    right = {"x.weight": (base["x.weight"] + product / 2).astype(np.float32), "x.bias": base["x.bias"] + whole}
    root = tiny.write_component(tmp_path / "base", base, 1)
    for name, tensors in {"right": right, "scaled": {**right, "x.bias": base["x.bias"] + whole / 2}}.items():
        out = tiny.write_component(tmp_path / name, tensors, 1)
        given = [LoraInput("l", lora, 1.0)]
        found = verify_merge(out, root, given, component="", rows=None, expected=Expectation())
        assert found.passed == (name == "right"), found.problems


def test_a_lora_without_a_configuration_is_verified_without_peft_and_torch(tmp_path: Path) -> None:
    """Their import takes seconds."""
    case = Case(tmp_path, adapter(), {"alpha": "1"})
    case.verify(0.25)
    code = (
        "import sys; from lora_fuse.cli import main; print(main(sys.argv[1:]), {'peft', 'torch'} & sys.modules.keys())"
    )
    arguments = ["verify", tmp_path / "out", case.base, "--lora", case.lora]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 set()"
