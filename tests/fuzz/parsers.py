"""A parser of foreign input as the fuzzer sees it, and the property that it is held to."""

import contextlib
import io
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from lora_fuse.errors import LoraFuseError
from lora_fuse.machine import text
from tests.fuzz.bounds import ROOT, bounds
from tests.fuzz.formats import Format
from tests.fuzz.trees import Draw


def nothing(_: Path) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Parser:
    """A parser, its valid inputs, and the format in which they are changed.

    `parse` gets a folder of its own, which `prepare` has filled, and the content. Beside `LoraFuseError` it may raise
    `errors`, which are those that its docstring says. `examples` are those of one run of the tests, 0 where only
    `make fuzz` tries it. `allowed` are audit events: it may ask a server on loopback, or start git.
    """

    name: str
    parse: Callable[[Path, bytes], object]
    format: Format
    valid: Callable[[], Sequence[bytes]]
    prepare: Callable[[Path], object] = nothing
    errors: tuple[type[Exception], ...] = ()
    examples: int = 10
    allowed: tuple[str, ...] = ()


@st.composite
def contents(draw: Draw, parser: Parser, valid: Sequence[bytes]) -> bytes:
    """Contents that are odd in one place, or in a few."""
    return parser.format(draw, draw(st.sampled_from(list(valid))))


def hold(parser: Parser, folder: Path, content: bytes) -> str:
    """Parse a content; it is read or refused, within bounds, and a refusal is one line, which is returned."""
    quiet = contextlib.redirect_stderr(io.StringIO())
    with quiet, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        try:
            with bounds(folder, parser.allowed):
                parser.parse(folder, content)
        except LoraFuseError as error:
            return one_line(error)
        except parser.errors as error:
            return repr(error)
    return ""


def one_line(error: Exception) -> str:
    """The message of a refusal, which is one line with nothing in it that a terminal obeys."""
    message = str(error)
    assert message.strip(), f"{type(error).__name__} without a message"
    assert message == text.line(message), repr(message)
    return message


def ready(parser: Parser, folder: Path) -> None:
    """Fill the folder, and let the parser import what it needs, which takes seconds of the bounds."""
    parser.prepare(folder)
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        parser.parse(folder, parser.valid()[0])


def these(*contents: bytes) -> Callable[[], Sequence[bytes]]:
    """Valid examples that are made already."""
    return lambda: contents


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def signature(error: BaseException) -> str:
    """The error's type and the last place of this project on the way to it: the same fault has the same one."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))]
    own = [frame for frame in frames if "/tests/fuzz/" not in frame.filename] or frames
    where = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "nowhere"
    return f"{type(error).__name__} at {where}"
