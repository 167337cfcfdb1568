"""Shared fixtures."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.once import Once
from tests.support.workspace import Workspace

pytest_plugins = ["tests.hub_server.fixtures"]

# Started in the background by a shell, this process ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
