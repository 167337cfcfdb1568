"""Laws of the look for LoRAs in a base without its original: what is there is found, what is not is never claimed."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

import lora_fuse
from benchmarks.base_pairs import BasePair, random_pairs
from lora_fuse import cli
from lora_fuse.differences import presence, presence_warnings
from lora_fuse.differences.presence import Presence
from lora_fuse.lora import LoraInput
from tests.support.machine import ROOT

Floats = npt.NDArray[np.float64]

POCKET = ROOT / "pocket/model/transformer"
TRAINED = sorted((ROOT / "pocket/lora").glob("*.safetensors"))


def look(base: Path, *loras: Path, scale: float = 1.0) -> list[Presence]:
    return presence.look_for(lora_fuse.plan(base, [LoraInput(path.name, path, scale) for path in loras]))


def merged_elsewhere(base: Path, lora: Path, out: Path, scale: float) -> Path:
    """A merge without any word of it in its headers, as other programs write it."""
    lora_fuse.fuse(lora_fuse.plan(base, [LoraInput("lora", lora, scale)]), out)
    for path in out.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def pairs() -> list[BasePair]:
    return list(random_pairs(16))


def test_no_random_lora_is_claimed_to_be_in_a_random_base(pairs: list[BasePair], tmp_path: Path) -> None:
    assert [pair.kind for pair in pairs if look(*pair.write(tmp_path, pair.weights))[0].claim] == []


def test_a_lora_that_is_in_its_base_is_found_at_its_scale(pairs: list[BasePair], tmp_path: Path) -> None:
    found = [look(*pair.write(tmp_path, pair.merged(0.9)))[0] for pair in pairs]
    claimed = [one.found for one in found if one.claim and one.found]
    assert len(claimed) >= 8  # those along the base's own directions cannot be told, nor can the weakest
    assert all(abs(one.scale - 0.9) < one.margin for one in claimed)


def test_trained_loras_are_not_in_the_base_that_they_were_trained_on(tmp_path: Path) -> None:
    """Nor where another is: but two versions of one training cannot be told apart."""
    assert [one.claim for one in look(POCKET, *TRAINED)] == [None, None, None]
    v1, v2, pastel = TRAINED
    ours = look(merged_elsewhere(POCKET, pastel, tmp_path / "pastel", 1.0), *TRAINED)
    assert [one.name for one in ours if one.claim] == [pastel.name]
    theirs = look(merged_elsewhere(POCKET, v2, tmp_path / "v2", 1.0), *TRAINED)
    assert [one.name for one in theirs if one.claim] == [v1.name, v2.name]
    for one in (ours[2], theirs[1]):
        assert one.found is not None
        assert abs(one.found.scale - 1.0) < one.found.margin < 0.25


def write(folder: Path, weights: Mapping[str, Floats], tensors: Mapping[str, Floats]) -> tuple[Path, Path]:
    """A base of one file and a LoRA, both in float32."""
    base = {f"{name}.weight": values.astype(np.float32) for name, values in weights.items()}
    save_file(base, folder / "base.safetensors")
    save_file({name: values.astype(np.float32) for name, values in tensors.items()}, folder / "lora.safetensors")
    return folder / "base.safetensors", folder / "lora.safetensors"


def other_kinds() -> Iterator[tuple[str, dict[str, Floats], Floats]]:
    """LoRAs without two plain factors for a weight of 96 x 64, and what each adds."""
    rng = np.random.default_rng(5)

    def drawn(*shape: int) -> Floats:
        return rng.standard_normal(shape).astype(np.float32).astype(np.float64) / 8

    a = [drawn(96, 2), drawn(2, 64), drawn(96, 2), drawn(2, 64)]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    yield "LoHa", dict(zip(names, a, strict=True)), (a[0] @ a[1]) * (a[2] @ a[3])
    left, right = drawn(6, 8), drawn(16, 8)
    yield "LoKr", {"lokr_w1": left, "lokr_w2": right}, np.asarray(np.kron(left, right), np.float64)
    whole = drawn(96, 64)
    yield "a whole difference", {"diff": whole}, whole


@pytest.mark.parametrize("kind", list(other_kinds()), ids=lambda kind: kind[0])
def test_other_kinds_of_deltas_are_found(kind: tuple[str, dict[str, Floats], Floats], tmp_path: Path) -> None:
    _, parts, delta = kind
    rng = np.random.default_rng(0)
    names = [f"blocks.{n}.to_q" for n in range(12)]
    weights = {name: rng.standard_normal((96, 64)) * 2 * delta.std() for name in names}
    tensors = {f"{name}.{part}": values for name in names for part, values in parts.items()}
    assert [one.claim for one in look(*write(tmp_path, weights, tensors))] == [None]
    (one,) = look(*write(tmp_path, {name: values + delta for name, values in weights.items()}, tensors))
    assert one.found is not None
    assert one.claim is not None
    assert abs(one.found.scale - 1.0) < one.found.margin


def test_codes_are_read_as_the_values_that_they_stand_for(tmp_path: Path) -> None:
    pair = next(random_pairs(4, seed=1))
    base, lora = pair.write(tmp_path, pair.merged(1.0))
    save_file({k: v.astype(ml_dtypes.float8_e4m3fn) for k, v in pair.merged(1.0).items()}, base)
    (one,) = look(base, lora)
    assert one.claim is not None


def test_a_lora_that_is_to_be_taken_out_is_not_warned_of_and_few_bytes_are_read(
    monkeypatch: pytest.MonkeyPatch, pairs: list[BasePair], tmp_path: Path
) -> None:
    place = pairs[0].write(tmp_path, pairs[0].merged(1.0))
    assert look(*place, scale=-1.0) == []
    (whole,) = look(*place)
    monkeypatch.setattr(presence, "WEIGHTS", 10)
    monkeypatch.setattr(presence, "NBYTES", 1 << 13)
    (some,) = look(*place)
    assert (some.weights, whole.weights) == (10, 24)
    assert some.nbytes <= 10 << 13 < whole.nbytes


@pytest.mark.parametrize(("count", "value"), [(7, 1.0), (20, 0.0), (9, np.nan)])
def test_a_base_of_few_weights_or_of_nothing_says_nothing(count: int, value: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"blocks.{n}.to_q" for n in range(count)]
    factors = {"lora_up.weight": rng.standard_normal((96, 4)), "lora_down.weight": rng.standard_normal((4, 64))}
    tensors = {f"{name}.{part}": values for name in names for part, values in factors.items()}
    weights = dict.fromkeys(names, np.full((96, 64), value) * rng.standard_normal((96, 64)))
    assert [one.found for one in look(*write(tmp_path, weights, tensors))] == [None]


def test_plan_and_fuse_warn_with_the_way_out_and_do_not_refuse(
    capsys: pytest.CaptureFixture[str], pairs: list[BasePair], tmp_path: Path
) -> None:
    base, lora = pairs[0].write(tmp_path, pairs[0].merged(1.0))
    (warning,) = presence_warnings(lora_fuse.plan(base, [LoraInput("lora", lora, 1.0)]))
    for command in (["plan", str(base)], ["fuse", str(base), str(tmp_path / "out.safetensors")]):
        assert cli.main([*command, "--lora", str(lora)]) == 0
        assert f"warning: {warning}" in capsys.readouterr().err
    assert "lora.safetensors is in " in warning
    assert warning.endswith("take the base without it, or leave the LoRA out")
