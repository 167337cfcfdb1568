"""Shared fixtures."""

import gc
import os
import signal
from collections.abc import Generator, Iterator
from functools import cache
from operator import itemgetter
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from lora_fuse.pictures.environment import CPU_PINS
from tests.hub_server import LoopbackHub
from tests.support import merges, tiny
from tests.support.downloads import Project
from tests.support.machine import Once
from tests.support.workspace import Workspace

CLEARED = ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_XET_CACHE", "HF_TOKEN_PATH")
MOST_WORKERS = 8  # each takes a gigabyte of memory

# More workers than cores: threads that spin take others' time. Workers and all processes of tests inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own, which spin whatever is said

# Read when torch and MKL first work in a process, which may be before a test renders: a floor would hang on the order.
for pin, value in CPU_PINS.items():
    os.environ.setdefault(pin, value)

# Started in the background by a shell, this process ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What takes longest begins first, so that no worker is left with it when the others have ended.
FIRST = ("stages/test_remotes", "studies/test_sweep_command", "stages/test_tiny_recipes", "pictures/test_distributed")
LONGEST = (*FIRST, "pocket/", "stages/", "fleet/")
WAITING = "tests/hub/"  # for a Hub that is slow, or gone


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two workers a core: many tests wait for a Hub that is slow on purpose, or for a process."""
    return min(2 * (os.cpu_count() or 1), MOST_WORKERS)


class Scheduling(LoadScopeScheduling):  # type: ignore[misc] # it has no types
    """The tests of a module that share a fixture go to one worker, all others to whichever is free.

    pytest-xdist's own loadgroup would ask for a mark in each module, and has no effect with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if shares_a_fixture(self.config.rootpath / file) else nodeid


@cache
def shares_a_fixture(file: Path) -> bool:
    return 'scope="module"' in file.read_text(encoding="utf-8")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    """Schedule so, whatever ``--dist`` says."""
    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without the garbage collector, which looks at nothing of it later: all libraries are imported here."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, and what waits is evenly among it: else the cores are idle while it does."""
    waiting = [item for item in items if WAITING in item.nodeid]
    working = [item for item in items if WAITING not in item.nodeid]
    working.sort(key=lambda item: next((at for at, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST)))
    longest = sum(any(name in item.nodeid for name in LONGEST) for item in working)
    places = [(at / max(1, longest), item) for at, item in enumerate(working)]
    places += [(at / len(waiting), item) for at, item in enumerate(waiting)]
    items[:] = [item for _, item in sorted(places, key=itemgetter(0))]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Results that all workers of pytest-xdist share; each has its own folder below that of the run."""
    base = tmp_path_factory.getbasetemp()
    return Once((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once")


@pytest.fixture(scope="session")
def built(once: Once) -> Workspace:
    """The default recipe, built and passed, in a checkout that no test may change."""
    return Workspace(once("built", Workspace.built))


@pytest.fixture
def workspace(built: Workspace, tmp_path: Path) -> Workspace:
    """A copy of `built`, to be changed."""
    return built.copy(tmp_path / "checkout")


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


@pytest.fixture
def project(hub: LoopbackHub, tmp_path: Path) -> Project:
    (tmp_path / "project").mkdir()
    return Project(tmp_path / "project")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_pipeline(tmp_path / "base", tiny.weights())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base and a LoRA whose merge takes long enough to be caught in the middle."""
    merges.write_base(tmp_path / "base")
    merges.write_lora(tmp_path / "l.safetensors")
    return tmp_path
