"""Laws of the Hub client's cache: it is where the client has it, whatever the environment says, and when."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_fuse.errors import MissingExtra
from lora_fuse.hub.client import cache_dir, is_offline, is_without_xet

NAMES = (
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HUGGINGFACE_CO_STAGING"),
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_XET"),
)
ASK = "from huggingface_hub import constants as c; print(c.HF_HUB_CACHE, c.HF_HUB_OFFLINE, c.HF_HUB_DISABLE_XET)"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"HF_HOME": "$HOME/hf", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"},
        {"HF_HOME": "~/hf", "HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "yes"},
        {"HF_HUB_CACHE": "${SCRATCH}/c", "HF_HOME": "/elsewhere", "HF_HUB_OFFLINE": "ON"},
        {"HUGGINGFACE_HUB_CACHE": "/old/name", "HF_HOME": "/elsewhere", "HF_HUB_DISABLE_XET": "true"},
        {"HUGGINGFACE_HUB_CACHE": "/old/name", "HF_HUB_CACHE": "~/new"},
        {"XDG_CACHE_HOME": "$SCRATCH/xdg", "HF_HUB_DISABLE_XET": "no"},
        {"HUGGINGFACE_CO_STAGING": "1"},
    ],
    ids="+".join,
)
def test_the_environment_means_what_it_means_to_the_client(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SCRATCH": "/scratch/me", **given}.items():
        monkeypatch.setenv(name, value)
    asked = subprocess.run(
        [sys.executable, "-c", ASK], env=dict(os.environ), capture_output=True, text=True, check=True
    )
    assert [str(cache_dir()), str(is_offline()), str(is_without_xet())] == asked.stdout.split()


def test_a_place_in_the_working_folder_is_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "here")
    monkeypatch.chdir(tmp_path)
    assert cache_dir() == tmp_path / "here"


def test_without_the_client_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtra, match=r"lora-fuse\[hub\]"):
        cache_dir()
