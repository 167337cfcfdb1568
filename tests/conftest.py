"""Shared fixtures."""

pytest_plugins = ["tests.hub_server.fixtures"]
