"""The whole error vocabulary: what can be refused, and what a failed check is called.

A message says what is wrong, which thing, both values, and the way out, on one line. The command line prints it
as ``error: …`` and exits 2 (`Refused`) or 1 (`CheckFailed`); `machine/last_resort.py` makes a `Refused` of all else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

from lora_fuse.machine import text

LONGEST = 2000  # characters of a message
# The extras of pyproject.toml, with the libraries of each that are imported here; all others are the core's.
EXTRAS = {
    "torch": ("torch",),
    "hub": ("httpx2", "huggingface_hub", "packageurl", "yaml"),
    "pipeline": (
        *("PIL", "accelerate", "cyclonedx", "diffusers", "flip_evaluator", "hydra", "jinja2"),
        *("junitparser", "omegaconf", "packaging", "peft", "psutil"),
        *("skimage", "ssimulacra2", "tabulate", "transformers"),
    ),
    "video": ("ftfy",),
    "gguf": ("gguf",),
    "fleet": ("ray",),
    "sign": ("OpenSSL", "cryptography", "model_signing", "securesystemslib", "sigstore"),
}


@dataclass(frozen=True, slots=True)
class Rerun:
    """The step to run next, for who knows how steps are run: a stage, and what it is told."""

    stage: str  # its name, or several with a space between; ``build`` is all, ``restore`` and ``bind`` are for goldens
    force: bool = False  # although nothing that it depends on changed
    cases: tuple[str, ...] = ()  # that it is for; empty for all
    settings: tuple[str, ...] = ()  # ``key=value`` for it alone; of ``restore``, the paths


class LoraFuseError(Exception):
    """Base of every error that lora-fuse raises on purpose; `rerun` is the way out, where that is a step."""

    exit_code = 2

    def __init__(self, message: str, *, rerun: Rerun | None = None) -> None:
        super().__init__(message)
        self.rerun = rerun

    def __str__(self) -> str:
        """One line, see `text.line`; of a very long one, as names in a broken file may make it, beginning and end."""
        line = text.line(" ".join(super().__str__().splitlines()))
        return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} […] {line[-LONGEST // 2 :]}"


class Refused(LoraFuseError):
    """The input cannot be used as asked; nothing was written."""


class MissingExtra(Refused):
    """A library of an extra is needed and not installed."""


class CheckFailed(LoraFuseError):
    """The work was done and a check says that the result is not right."""

    exit_code = 1


class BadCheckpoint(Refused):
    """A base, a shard, an index or a header is missing, truncated or contradicts itself."""


class Unquantisable(BadCheckpoint):
    """A matrix has a shape or values that a format of few bits cannot hold, or what is stored of it does not add up."""


class BadLora(Refused):
    """A LoRA file is missing, is not safetensors, or its keys do not add up."""


class UnmatchedTargets(BadLora):
    """The LoRA names modules that the base does not have."""


class WrongPrefix(UnmatchedTargets):
    """The LoRA's modules are all in the base, but for the beginning of their names."""


class ShapeMismatch(BadLora):
    """A LoRA's factors do not fit the weight they are meant for."""


class FactorMismatch(ShapeMismatch):
    """A LoRA's factors do not fit each other, or the rank that is said of them."""


class BadScale(Refused):
    """A scale is not a finite number."""


class BadConfig(Refused):
    """A parameter is unknown, missing or of the wrong type."""


class NoSpace(Refused):
    """The disk has less room than the result needs."""


class NoDevice(Refused):
    """The device asked for is not on this machine."""


class Busy(Refused):
    """Another run is writing the same result."""


class ProcessLost(Refused):
    """Another process of the same run has ended."""


class BadSource(Refused):
    """A repository, revision or file cannot be had, or its content is not what was promised."""


class WrongContent(BadSource):
    """The bytes of a file that came are not those that were promised of it."""


class ConnectionLost(BadSource):
    """A Hub cannot be had any more: what is finished stays, and the same command goes on with it."""


class PublishRefused(Refused):
    """Something that publishing needs is missing, failed, or belongs to other bytes."""


class BadKey(Refused):
    """A key cannot be used."""


class RenderFailed(Refused):
    """A pipeline cannot be loaded or run as the recipe says."""


class OutOfMemory(RenderFailed):
    """The pipeline or a picture does not fit the GPU's memory."""


class BadGolden(Refused):
    """An approved picture is missing, is not the one that was approved, or nobody approved it."""


@contextmanager
def naming_extras(what: str) -> Iterator[None]:
    """Refuse what is done inside, `what`, if it imports a library of `EXTRAS` that is not installed.

    Raises:
        MissingExtra: a library is not installed; the message names its extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        extra = next((extra for extra, libraries in EXTRAS.items() if error.name in libraries), None)
        if extra is None:
            raise
        raise MissingExtra(
            f"{what} needs {error.name}, which is not installed: pip install 'lora-fuse[{extra}]'"
        ) from error


def require(library: str, what: str) -> None:
    """Refuse `what` where a library of `EXTRAS` is not installed, without the time that its import takes.

    Raises:
        MissingExtra: see `naming_extras`.
    """
    with naming_extras(what):
        if find_spec(library) is None:
            raise ModuleNotFoundError(name=library)
