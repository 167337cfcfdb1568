"""Shared fixtures."""

import signal

pytest_plugins = ["tests.hub_server.fixtures"]

# Started in the background by a shell, this process ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
