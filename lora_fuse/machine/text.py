r"""Text on its way out: to a terminal, a Markdown page, an XML file. Nothing else in the library prints.

The names in a LoRA, a base or a list, and a Hub's words, are foreign: a control character in them is shown as its
escape (``\x1b``), as is one that turns the direction of writing, and no sign in them is a sign of Markdown. The access
token is in no message.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

# ECMA-48, SGR
COLOURS = {
    **dict.fromkeys(("ok", "passed", "exact", "drift"), 32),  # green
    **dict.fromkeys(("warn", "warning", "review", "no-golden"), 33),  # yellow
    **dict.fromkeys(("FAIL", "FAILED", "error", "regression", "invalid"), 31),  # red
}
# Unicode's invisible characters that direct what is shown: joiners, marks and overrides of direction, separators of
# lines, tags; and those that no UTF-8 file may hold (half pairs) or no XML file (the two non-characters).
_UNSEEN = "\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff"
_UNSEEN += "\U000e0000-\U000e007f"
_IN_A_LINE = re.compile(f"[\x00-\x1f{_UNSEEN}]")
_IN_A_FILE = re.compile(f"[\x00-\x08\x0b-\x1f{_UNSEEN}]")
_TOKEN = re.compile(r"(?:hf_(?:oauth_|jwt_|app_)?|api_org_)[A-Za-z0-9]{20}[A-Za-z0-9._-]*")
_USER = re.compile(r"(https?://)[^\s/?#'\"]+@")
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"\\]+")

COMPARED = 200  # characters of names that are compared

_SIGNS = re.compile(r"[\\`*_\[\]|~$]")
# The beginning of a line that is a heading, an item of a list, or a rule below the line before.
_BEGINNING = re.compile(r"^ ?(?:#|[+-](?= )|\d{1,9}[.)](?= |$)|(?:=+|-{2,})(?= ?$))")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# What a code host makes links of by itself, after Markdown, where no backslash helps: a comment parts the sign from it.
_LINKS = re.compile(r"@(?=\w)|#(?=\d)|:(?=//)|\bwww(?=\.)", re.IGNORECASE)


class Markdown(str):
    """Text that is Markdown as it stands."""

    __slots__ = ()


def redacted(text: str) -> str:
    """A text without the access token or what looks like one; of addresses without a name, a password, a query."""
    secret = os.environ.get("HF_TOKEN", "").strip()
    text = _QUERY.sub(r"\1?…", text.replace(secret, "(token)") if secret else text)
    return _TOKEN.sub("(token)", _USER.sub(r"\1", text))


def line(text: object) -> str:
    """One line for a terminal: characters that a terminal obeys, or that nobody sees, as their escapes in Python."""
    return _IN_A_LINE.sub(_escape, redacted(str(text)))


def one_line(error: Exception) -> str:
    """The text of an error of a library, without its line breaks."""
    return " ".join(str(error).split())


def xml(text: object) -> str:
    """Text for an XML or HTML file, or a whole file: as `line`, but its line ends and tabs stay.

    Markup is left alone: the library that writes the file escapes it.
    """
    return _IN_A_FILE.sub(_escape, redacted(str(text)))


def markdown(text: object) -> Markdown:
    """One line of Markdown that shows the text as it is, also in a cell or heading; `Markdown` is left as it is."""
    if isinstance(text, Markdown):
        return text
    if isinstance(text, (int, float)):
        return Markdown(text)
    shown = _SIGNS.sub(r"\\\g<0>", line(re.sub(r"\s+", " ", str(text))))
    shown = _BEGINNING.sub(lambda found: f"{found[0][:-1]}\\{found[0][-1]}", shown)
    shown = re.sub("[&<>]", lambda found: _HTML[found[0]], shown)
    return Markdown(_LINKS.sub(r"\g<0><!-- -->", shown))


def nearest(name: str, known: Iterable[str], count: int = 1, *, least: float = 0.0) -> list[str]:
    """The known names that are most like one, best first, and at `least` so much (1 is equal); for *did you mean*.

    The work grows with the names' lengths: it is done on their beginnings, and ends after a second.
    """
    end = time.monotonic() + 1.0
    looked_at = takewhile(lambda _: time.monotonic() < end, (one[:COMPARED] for one in known))
    return difflib.get_close_matches(name[:COMPARED], looked_at, n=count, cutoff=least)


def code(text: object, *, in_table: bool = False) -> Markdown:
    """The text as a code span, between more backticks than it has in a row; empty where it is."""
    shown = line(text)
    if not shown:
        return Markdown("")
    if in_table:  # the one sign that a table takes for its own even there
        shown = shown.replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    pad = " " if shown[0] in "` " or shown[-1] in "` " else ""
    return Markdown(f"{fence}{pad}{shown}{pad}{fence}")


def link(path: str) -> Markdown:
    """A path as the target of a link or picture in Markdown."""
    return Markdown(quote(redacted(path), errors="surrogateescape"))


def markdown_table(rows: Sequence[Sequence[object]]) -> Markdown:
    """A table of Markdown, the first row its head."""
    lines = ["| " + " | ".join(map(markdown, row)) + " |" for row in rows]
    return Markdown("\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]))


def say(sentence: object, stream: TextIO | None = None, *, before: str = "") -> None:
    """Print one line, its first word in the colour of a verdict if it is one; to stdout where no stream is given.

    Args:
        sentence: anything; see `line`.
        stream: stdout or stderr.
        before: what the line begins with, before the word that is coloured.
    """
    to = sys.stdout if stream is None else stream
    print(line(before) + _painted(line(sentence), to), file=to, flush=True)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def _painted(shown: str, stream: TextIO) -> str:
    """The line in colour, as https://no-color.org has it, and `FORCE_COLOR` against it."""
    word = shown.split(" ", 1)[0]
    colour = COLOURS.get(word.rstrip(":,"))
    if colour is None or not _has_colour(stream):
        return shown
    return f"\x1b[1;{colour}m{word}\x1b[0m{shown[len(word) :]}"


def _has_colour(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def place(given: str) -> Path | str:
    """A place that a command names: on this machine, or a pipeline on the Hub, ``hf://owner/name@commit``, as it is."""
    return given if given.startswith("hf://") else Path(given)
