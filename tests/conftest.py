"""Shared fixtures."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.once import Once
from tests.support.workspace import Workspace

pytest_plugins = ["tests.hub_server.fixtures"]

MOST_WORKERS = 8  # each takes a gigabyte of memory

# Started in the background by a shell, this process ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What takes longest begins first, so that no worker is left with it when the others have ended.
LONGEST = ("stages/test_remotes", "studies/test_sweep_command", "pictures/test_distributed", "pocket/", "stages/")


def pytest_xdist_auto_num_workers() -> int:
    """Two workers a core: many tests wait for a Hub that is slow on purpose, or for a process."""
    return min(2 * (os.cpu_count() or 1), MOST_WORKERS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that share a fixture of their module in one worker; all others go where there is time."""
    for item in items:
        if isinstance(item, pytest.Function):
            definitions = [found for all_found in item._fixtureinfo.name2fixturedefs.values() for found in all_found]
            if any(found.scope == "module" for found in definitions):
                item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: next((at for at, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST)))


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
