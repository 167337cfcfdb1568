"""The model families that are known: a file each, with a `FAMILY`. A new family is a new file here."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from lora_fuse.models.family import Family
from lora_fuse.models.pipeline_call import PipelineCall


@cache
def families() -> tuple[Family, ...]:
    """All families, by the names of their files."""
    modules = sorted(module.name for module in iter_modules(__path__))
    return tuple(import_module(f"{__name__}.{module}").FAMILY for module in modules)


@cache
def pipelines() -> dict[str, PipelineCall]:
    """The pipeline classes that pictures are made with, by name; families may share one."""
    return {call.name: call for family in families() for call in family.pipelines}
