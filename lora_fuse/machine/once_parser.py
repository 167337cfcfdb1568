"""A parser of command lines that loses nothing: argparse keeps the last of several values of an option, in silence."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from lora_fuse.machine import text


class OnceParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose options are given once, but for those that append; so are its subcommands'."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.register("action", None, _StoreOnce)
        self.register("action", "store", _StoreOnce)

    def error(self, message: str) -> NoReturn:
        """End with usage and message, whose words may be names of files."""
        super().error(text.line(message))


class _StoreOnce(argparse.Action):
    def __call__(
        self, _: argparse.ArgumentParser, given: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        seen: set[str] = vars(given).setdefault("_seen", set())
        if option is not None and self.dest in seen:
            raise argparse.ArgumentError(self, f"given twice, {getattr(given, self.dest)} and {value}; give it once")
        seen.add(self.dest)
        setattr(given, self.dest, value)
