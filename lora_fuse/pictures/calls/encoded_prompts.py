"""Prompts encoded apart from the rest: what a pipeline's own `encode_prompt` returned is given back to its next call.

No argument of any class is named here: the call prepares what its text encoder sees, and gets the same tensors later.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

Prompts: TypeAlias = Sequence[Any]  # what `encode_prompt` returned, call by call


class PromptsEncoded(Exception):
    """Ends a pipeline's call where its prompts are encoded."""


class AbsentModel:
    """Stands for a denoiser while prompts are encoded: a call asks for its configuration, and for its dtype."""

    def __init__(self, config: Path, dtype: object) -> None:
        import diffusers
        from diffusers.configuration_utils import FrozenDict

        stored = json.loads(config.read_text(encoding="utf-8"))
        kind = getattr(diffusers, str(stored.get("_class_name")))
        defaults = {name: given.default for name, given in inspect.signature(kind).parameters.items()}
        self.config = FrozenDict(defaults | stored)
        self.dtype = dtype

    def __getattr__(self, name: str) -> Any:
        if name != "config" and name in self.config:
            return self.config[name]
        raise AttributeError(name)


def recorded(pipe: Any, call: Callable[[], object]) -> Prompts:
    """Run a pipeline's call up to its latents or timesteps, and return what its prompts became."""
    found: list[Any] = []
    encode = pipe.encode_prompt

    def keep(*positional: object, **given: object) -> Any:
        found.append(encode(*positional, **given))
        return found[-1]

    def end(*_: object, **__: object) -> None:
        raise PromptsEncoded

    with (
        _instead(pipe, "encode_prompt", keep),
        _instead(pipe, "prepare_latents", end),
        _instead(pipe.scheduler, "set_timesteps", functools.wraps(pipe.scheduler.set_timesteps)(end)),
        suppress(PromptsEncoded),
    ):
        call()
    return tuple(found)


@contextmanager
def replayed(pipe: Any, prompts: Prompts | None) -> Iterator[None]:
    """Within it, a pipeline's call finds its prompts encoded, in the order in which they were; None changes nothing."""
    if prompts is None:
        yield
        return
    left = iter(prompts)
    with _instead(pipe, "encode_prompt", lambda *_, **__: next(left)):
        yield


@contextmanager
def _instead(owner: Any, method: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Give an object another method for a while."""
    vars(owner)[method] = replacement
    try:
        yield
    finally:
        del vars(owner)[method]
