"""Laws of families: one file each, whose names are its own; and known good pairs of another base are not warned of."""

import dataclasses
from pathlib import Path

import pytest

from lora_fuse.models import families, made_for, pair_warnings

ROOT = Path(__file__).resolve().parents[2]


def test_every_file_is_a_family_and_no_two_share_a_base_or_a_name() -> None:
    files = {path.stem for path in (ROOT / "lora_fuse/models/families").glob("[!_]*.py")}
    bases = [base.repo_id for family in families() for base in family.bases]
    assert len(families()) == len(files) == len({family.name for family in families()})
    assert len(bases) == len(set(bases))
    assert all(other in bases for family in families() for base in family.bases for other in base.loras_of)


def test_a_lora_of_raw_goes_into_turbo_and_not_the_other_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    (krea,) = (family for family in families() if family.name == "Krea 2")
    bases = tuple(dataclasses.replace(base, loras=(f"{base.repo_id}-Lora/*",)) for base in krea.bases)
    monkeypatch.setattr(made_for, "families", lambda: (dataclasses.replace(krea, bases=bases),))
    assert pair_warnings("krea/Krea-2-Turbo", [("krea/Krea-2-Raw-Lora", "a.safetensors")]) == []
    (said,) = pair_warnings("krea/Krea-2-Raw", [("krea/Krea-2-Turbo-Lora", "a.safetensors")])
    assert "made for krea/Krea-2-Turbo, not for krea/Krea-2-Raw" in said
