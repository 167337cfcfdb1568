"""Fixtures: a Hub on the loopback interface, and an environment in which clients find it and nothing else."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server.server import LoopbackHub

CLEARED = ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_XET_CACHE", "HF_TOKEN_PATH")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A running Hub; `HF_ENDPOINT`, `HF_HOME` and `HF_TOKEN` (alice's, who may write) are set for it.

    The client reads its environment when it is imported, which may be long before: `lora_fuse` hands it over
    at each call, and a test that uses `huggingface_hub` itself must do so too, or run in a new process.
    """
    with LoopbackHub(tmp_path / "hub").run() as server:
        for name in CLEARED:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        yield server
