"""Laws of the goldens: what was approved comes back exactly, and nothing else ever does."""

import json
import math
import re
import subprocess
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fuse.errors import BadGolden, Rerun
from lora_fuse.pictures.environment import FLAGS, Environment
from lora_fuse.pictures.metrics import METRICS
from lora_fuse.recipe.records import Tool, to_json
from lora_fuse.regression.approved_list import LIST, read_list, sums_of, write_list
from lora_fuse.regression.candidates import CaseRecord, Provenance, differences
from lora_fuse.regression.goldens import Goldens
from tests.support.approved import APPROVAL, ENVIRONMENT, KEY, LORA, PROVENANCE, candidate, picture, png, run_record

NEAR = replace(KEY, torch="2.12")
FAR = replace(KEY, torch="2.11", isa="x86_64-default", threads=8)


def approve(goldens: Goldens, seed: int = 0, *, beside: bool = False, **about: Any) -> Path:
    run = run_record(about.pop("key", KEY))
    return goldens.approve(png(seed), candidate(png(seed), **about), run, APPROVAL, beside=beside)


def names(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in (".png", ".json"))


def list_again(folder: Path) -> None:
    """Leave the list of somebody who edits goldens and knows of it."""
    write_list(folder, sums_of(folder), "edited")


@pytest.fixture
def held(tmp_path: Path) -> tuple[Goldens, Path]:
    """Goldens with one picture, and its path."""
    goldens = Goldens(tmp_path / "pocket")
    return goldens, approve(goldens)


def test_what_was_approved_comes_back_exactly_with_its_record(held: tuple[Goldens, Path], tmp_path: Path) -> None:
    goldens, path = held
    assert path == tmp_path / "pocket" / str(KEY) / "rabbit.png"
    (found,) = goldens.for_run(KEY, ["rabbit"])["rabbit"]
    assert (found.levels == picture()).all()
    assert (found.name, found.elsewhere) == ("rabbit.png", None)
    assert found.record.provenance == PROVENANCE
    assert found.record.approval == APPROVAL
    assert found.record.sha256 == candidate(png()).sha256
    assert path.read_bytes() == png()


def test_the_record_lies_beside_the_picture_and_has_everything(held: tuple[Goldens, Path]) -> None:
    _, path = held
    record = json.loads(path.with_suffix(".json").read_text())
    assert record.keys() == {"schema", "sha256", "floor", "approval", "provenance", "clip"}
    assert record["approval"].keys() == {"by", "at", "reason", "replaces"}
    assert record["provenance"].keys() == {field.name for field in fields(Provenance)}
    assert record["provenance"]["case"].keys() == {field.name for field in fields(CaseRecord)}
    assert record["provenance"]["environment"].keys() == {field.name for field in fields(Environment)}


def test_a_case_without_a_golden_has_none(held: tuple[Goldens, Path], tmp_path: Path) -> None:
    goldens, _ = held
    assert goldens.for_run(KEY, ["photo", "rab"]) == {"photo": [], "rab": []}
    assert Goldens(tmp_path / "nowhere").for_run(KEY, ["rabbit"]) == {"rabbit": []}


# What nobody approved


def refusal(goldens: Goldens) -> str:
    with pytest.raises(BadGolden) as caught:
        goldens.for_run(KEY, ["rabbit"])
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_a_picture_that_was_changed_is_refused_with_both_sha256(held: tuple[Goldens, Path]) -> None:
    import hashlib

    goldens, path = held
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    message = refusal(goldens)
    assert hashlib.sha256(content).hexdigest() in message
    assert hashlib.sha256(png()).hexdigest() in message


@pytest.mark.parametrize(
    ("gone", "said"), [(".json", "rabbit.png has no record rabbit.json"), (".png", "has no picture rabbit.png")]
)
def test_half_a_golden_is_refused(held: tuple[Goldens, Path], gone: str, said: str) -> None:
    goldens, path = held
    path.with_suffix(gone).unlink()
    assert f"{path.with_suffix(gone)} was approved and is not there" in refusal(goldens)
    list_again(path.parent)
    assert said in refusal(goldens)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"schema": 1}', b"<<<<<<< HEAD\n"])
def test_a_record_that_is_none_is_refused(held: tuple[Goldens, Path], content: bytes) -> None:
    goldens, path = held
    path.with_suffix(".json").write_bytes(content)
    list_again(path.parent)
    with pytest.raises(BadGolden, match=r"rabbit\.json") as caught:
        goldens.for_run(KEY, ["rabbit"])
    assert caught.value.rerun == Rerun("restore", settings=(str(path.parent),))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_abs", 1e6),
        ("max_abs", -1.0),
        ("mean_abs", 256),
        ("changed_share", 1.5),
        ("flip", 1e6),
        ("flip_worst", 2.0),
        ("comb_db", math.inf),
        ("latents_l2", math.nan),
        ("psnr_db", -20.0),
        ("psnr_db", -math.inf),
        ("ssim", -2.0),
        ("ssim", 1.5),
        ("ssimulacra2", -math.inf),
        ("lpips", 0.1),
    ],
)
def test_a_noise_floor_that_no_run_can_have_is_refused(held: tuple[Goldens, Path], name: str, value: float) -> None:
    goldens, path = held
    record = json.loads(path.with_suffix(".json").read_text())
    record["floor"][name] = value
    path.with_suffix(".json").write_text(json.dumps(record))
    list_again(path.parent)
    message = refusal(goldens)
    assert "rabbit.json has a noise floor of " in message
    assert name in message


@pytest.mark.parametrize("record", sorted(Path(__file__).parents[2].glob("artifacts/golden/*/*/*.json")), ids=str)
def test_the_floors_of_what_is_approved_here_are_floors(record: Path) -> None:
    floor = json.loads(record.read_text())["floor"]
    assert all(METRICS[name].can_be(value) for name, value in floor.items())


def test_a_golden_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    goldens, pointer = Goldens(tmp_path), b"version https://git-lfs.github.com/spec/v1\n"
    goldens.approve(pointer, candidate(pointer), run_record(), APPROVAL)
    assert "is no picture" in refusal(goldens)


@pytest.mark.parametrize("place", ["photo", "../{other}/rabbit"])
def test_a_golden_in_another_place_is_not_one_of_there(held: tuple[Goldens, Path], place: str) -> None:
    """A picture of another case or environment would pass as exact."""
    goldens, path = held
    for suffix in (".png", ".json"):
        there = path.parent / f"{place.format(other=NEAR)}{suffix}"
        there.parent.mkdir(exist_ok=True)
        there.write_bytes(path.with_suffix(suffix).read_bytes())
    list_again(there.parent)
    with pytest.raises(BadGolden, match=f"was approved as {KEY}/rabbit"):
        goldens.for_run(KEY if place == "photo" else NEAR, ["photo" if place == "photo" else "rabbit"])


# The list


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace("it is purple", "it is  purple"))


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a record edited": (lambda path: edit(path.with_suffix(".json")), "rabbit.json has sha256 "),
    "a record added": (lambda path: path.with_name("a.json").write_text("{}"), "a.json is not in SHA256SUMS"),
    "a picture added": (lambda path: path.with_name("a.png").write_bytes(png()), "a.png is not in SHA256SUMS"),
    "no list": (lambda path: path.with_name(LIST).unlink(), "has no SHA256SUMS, so nothing says"),
    "an empty list": (lambda path: path.with_name(LIST).write_text(""), "is not in SHA256SUMS"),
    "no text": (lambda path: path.with_name(LIST).write_bytes(b"\xff"), "SHA256SUMS cannot be read"),
    "no sums": (lambda path: path.with_name(LIST).write_text("rabbit.png"), "the line 'rabbit.png', which lists no"),
    "twice": (lambda path: path.with_name(LIST).write_text(f"{'0' * 64}  a.png\n" * 2), "which lists no golden"),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_what_is_not_as_the_list_of_an_approval_has_it_is_no_golden_and_no_approval_makes_it_one(
    held: tuple[Goldens, Path], kind: str
) -> None:
    goldens, path = held
    tamper, said = TAMPERED[kind]
    tamper(path)
    assert said in refusal(goldens)
    with pytest.raises(BadGolden, match=re.escape(said)):
        approve(goldens, 1, name="hat")


def test_two_goldens_that_are_swapped_are_refused(held: tuple[Goldens, Path]) -> None:
    goldens, path = held
    approve(goldens, 1, name="hat")
    for suffix in (".png", ".json"):
        ours, theirs = (path.with_name(f"{name}{suffix}") for name in ("rabbit", "hat"))
        content = ours.read_bytes()
        ours.write_bytes(theirs.read_bytes())
        theirs.write_bytes(content)
    assert "rabbit.json has sha256 " in refusal(goldens)


def test_the_list_is_one_that_coreutils_check_and_names_who_approved(held: tuple[Goldens, Path]) -> None:
    _, path = held
    done = subprocess.run(["sha256sum", "--check", "--strict", LIST], cwd=path.parent, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"rabbit.json: OK\nrabbit.png: OK\n")
    assert path.with_name(LIST).read_text().startswith(f"# approved by {APPROVAL.by}, {APPROVAL.at}: {APPROVAL.reason}")


def test_goldens_of_before_there_were_lists_are_bound_as_they_are_after_a_look_at_each(
    held: tuple[Goldens, Path], tmp_path: Path
) -> None:
    goldens, path = held
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    path.with_name(LIST).unlink()
    with pytest.raises(BadGolden) as caught:
        goldens.for_run(KEY, ["rabbit"])
    assert caught.value.rerun == Rerun("bind")
    assert goldens.bind("bound by A Person: as they were") == [path.with_name(LIST)]
    assert goldens.bind("again") == []
    assert len(goldens.for_run(KEY, ["rabbit"])["rabbit"]) == 1
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    path.with_name(LIST).unlink()
    path.write_bytes(png(1))
    with pytest.raises(BadGolden, match=r"rabbit\.png has sha256 "):
        goldens.bind("x")
    assert not path.with_name(LIST).exists()


@pytest.mark.parametrize("folder", sorted(Path(__file__).parents[2].glob("artifacts/golden/*/*/")), ids=str)
def test_what_is_approved_here_is_as_its_list_has_it(folder: Path) -> None:
    assert read_list(folder) == sums_of(folder)


# Approving


def test_another_approval_takes_the_place_of_the_first_and_says_so(held: tuple[Goldens, Path], tmp_path: Path) -> None:
    goldens, path = held
    assert approve(goldens, 1) == path
    (found,) = goldens.for_run(KEY, ["rabbit"])["rabbit"]
    assert (found.levels == picture(1)).all()
    assert found.record.approval == replace(APPROVAL, replaces=(candidate(png()).sha256,))
    assert names(tmp_path) == [f"pocket/{KEY}/rabbit.json", f"pocket/{KEY}/rabbit.png"]


def test_several_pictures_of_a_case_can_be_goldens_and_one_takes_the_place_of_all(
    held: tuple[Goldens, Path], tmp_path: Path
) -> None:
    goldens, path = held
    paths = [path, *(approve(goldens, seed, beside=True) for seed in (1, 2, 1))]
    assert [path.name for path in paths] == ["rabbit.png", "rabbit.2.png", "rabbit.3.png", "rabbit.2.png"]
    found = goldens.for_run(KEY, ["rabbit"])["rabbit"]
    assert {one.levels.tobytes() for one in found} == {picture(seed).tobytes() for seed in range(3)}
    assert all(one.record.approval.replaces == () for one in found)
    approve(goldens, 3)
    (last,) = goldens.for_run(KEY, ["rabbit"])["rabbit"]
    assert sorted(last.record.approval.replaces) == sorted(candidate(png(seed)).sha256 for seed in range(3))
    assert names(tmp_path) == [f"pocket/{KEY}/rabbit.json", f"pocket/{KEY}/rabbit.png"]


def test_an_approval_leaves_other_cases_and_environments_alone(held: tuple[Goldens, Path], tmp_path: Path) -> None:
    goldens, _ = held
    approve(goldens, 1, name="rabbit-2")
    approve(goldens, 2, key=NEAR)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    approve(goldens, 3)
    after = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    assert {name for name in before if after[name] != before[name]} == {
        f"pocket/{KEY}/rabbit.{suffix}" for suffix in ("png", "json")
    }
    assert before.keys() == after.keys()


@pytest.mark.parametrize("beside", [False, True])
def test_a_picture_that_is_not_the_judged_one_is_refused_and_nothing_written(
    held: tuple[Goldens, Path], tmp_path: Path, beside: bool
) -> None:
    goldens, path = held
    judged, changed = candidate(png(1)), bytearray(png(1))
    changed[-1] ^= 1
    with pytest.raises(BadGolden, match="the picture of rabbit is not the one that was judged"):
        goldens.approve(bytes(changed), judged, run_record(), APPROVAL, beside=beside)
    assert path.read_bytes() == png()
    assert len(names(tmp_path)) == 2


# The nearest environment


def test_where_there_is_no_golden_that_of_the_nearest_environment_is_shown(tmp_path: Path) -> None:
    goldens = Goldens(tmp_path)
    for seed, key in enumerate([FAR, NEAR]):
        approve(goldens, seed, key=key)
    (found,) = goldens.for_run(KEY, ["rabbit"])["rabbit"]
    assert (found.levels == picture(1)).all()
    assert found.elsewhere == f"{NEAR} (torch 2.12, there 2.13)"
    approve(goldens, 2)
    (found,) = goldens.for_run(KEY, ["rabbit"])["rabbit"]
    assert found.elsewhere is None


def test_each_case_has_the_nearest_environment_of_its_own(tmp_path: Path) -> None:
    goldens = Goldens(tmp_path)
    approve(goldens, 0, key=NEAR)
    approve(goldens, 1, key=FAR, name="photo")
    found = goldens.for_run(KEY, ["rabbit", "photo"])
    assert str(NEAR) in str(found["rabbit"][0].elsewhere)
    assert str(FAR) in str(found["photo"][0].elsewhere)


@pytest.mark.parametrize("other", [replace(KEY, dtype="bfloat16"), replace(KEY, device="cuda")])
def test_another_dtype_or_device_is_never_near(tmp_path: Path, other: Any) -> None:
    goldens = Goldens(tmp_path)
    approve(goldens, key=other)
    assert goldens.for_run(KEY, ["rabbit"]) == {"rabbit": []}


# What changed


NOW = PROVENANCE
OTHER_LORA = replace(LORA, sha256="9" * 64, revision="8" * 40)


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (replace(NOW, loras=(OTHER_LORA,)), ["LoRA lightning", "b" * 12, "8" * 12, "a" * 12, "9" * 12]),
        (replace(NOW, loras=(replace(LORA, scale=0.9),)), ["LoRA lightning has scale 1, had 0.9"]),
        (replace(NOW, loras=()), ["LoRA lightning is new"]),
        (replace(NOW, loras=(LORA, replace(LORA, name="style"))), ["LoRA style is gone"]),
        (replace(NOW, base="owner/base@9", base_sha256="0" * 64), ["the base is owner/base@0123", "owner/base@9"]),
        (replace(NOW, case=replace(NOW.case, prompt="blue")), ["the case's prompt is make it purple, was blue"]),
        (replace(NOW, case=replace(NOW.case, seed=7)), ["the case's seed is 0, was 7"]),
        (replace(NOW, case=replace(NOW.case, images={})), ["the case's images", "e" * 64]),
        (replace(NOW, sigmas=(1.0, 0.0)), ["sigmas is (1.0, 0.89", "was (1.0, 0.0)"]),
        (replace(NOW, steps=8), ["steps is 4, was 8"]),
        (replace(NOW, pipeline="QwenImagePipeline"), ["pipeline is QwenImageEditPipeline, was QwenImagePipeline"]),
        (replace(NOW, scheduler={**NOW.scheduler, "shift": 3.0}), ["scheduler shift is 1.0, was 3.0"]),
        (replace(NOW, scheduler={**NOW.scheduler, "gone": 1}), ["scheduler gone is None, was 1"]),
        (replace(NOW, environment=replace(ENVIRONMENT, torch="2.12.1")), ["torch is 2.13.0+cpu, was 2.12.1"]),
        (replace(NOW, environment=replace(ENVIRONMENT, device_name="arm64")), ["device_name is x86_64, was arm64"]),
        (replace(NOW, environment=replace(ENVIRONMENT, key=replace(KEY, threads=8))), ["threads is 2, was 8"]),
        (replace(NOW, environment=replace(ENVIRONMENT, key=replace(KEY, isa="z"))), ["isa is x86_64-avx2, was z"]),
        (replace(NOW, environment=replace(ENVIRONMENT, flags={**ENVIRONMENT.flags, "tf32": "on"})), ["tf32 is off"]),
        (replace(NOW, environment=replace(ENVIRONMENT, flags={})), ["MKL_CBWR is COMPATIBLE, was None"]),
    ],
)
def test_what_changed_since_an_approval_is_named(then: Provenance, said: list[str]) -> None:
    text = "; ".join(differences(NOW, then))
    assert all(words in text for words in said), text


def test_nothing_is_said_to_have_changed_where_nothing_has() -> None:
    again = replace(NOW, manifest_sha256="1" * 64, tool=Tool("0.2.0", "2" * 40, dirty=True))
    assert differences(NOW, again) == differences(NOW, replace(NOW)) == []


def test_older_words_for_the_same_attention_are_a_change_on_a_gpu_alone() -> None:
    older = {"sdpa_backend": "memory-efficient on CUDA, flash on the CPU, else math"}
    newer = {"sdpa_backend": FLAGS["sdpa_backend"]}
    for device, count in (("cpu", 0), ("cuda", 1)):
        on = replace(ENVIRONMENT, key=replace(KEY, device=device))
        now, then = (replace(NOW, environment=replace(on, flags=flags)) for flags in (newer, older))
        assert len(differences(now, then)) == count


def test_a_single_change_is_a_single_sentence() -> None:
    assert len(differences(NOW, replace(NOW, steps=8))) == 1
    assert len(differences(NOW, replace(NOW, loras=(OTHER_LORA,)))) == 1


def test_a_record_survives_its_file(held: tuple[Goldens, Path]) -> None:
    goldens, path = held
    (found,) = goldens.for_run(KEY, ["rabbit"])["rabbit"]
    assert to_json(found.record) == path.with_suffix(".json").read_text()
    np.testing.assert_array_equal(found.levels, picture())
