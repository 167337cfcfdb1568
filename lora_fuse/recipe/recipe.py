"""A recipe: all parameters of one buildable variant, as `params.yaml` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from lora_fuse.recipe import sections


class Recipe(sections.Section):
    """All of `params.yaml`: one buildable variant."""

    name: sections.Name
    base: sections.BaseParams
    loras: Annotated[dict[sections.Name, sections.LoraParams], Field(min_length=1)]
    download: sections.DownloadParams
    fuse: sections.FuseParams
    scheduler: sections.AnyScheduler | None  # null keeps the base's own
    sampling: sections.RecipeSamplingParams
    verify: sections.VerifyParams
    regress: sections.RegressParams
    validation: sections.ValidationParams
    export: sections.ExportParams
    publish: sections.PublishParams

    @property
    def asked(self) -> tuple[dict[str, float], int]:
        """The scale of every LoRA and the steps, with which pictures have to be made to be approved."""
        return {name: self.fuse.scale_of(name) for name in self.loras}, self.sampling.steps

    @property
    def streams(self) -> bool:
        """True where the base is on the Hub and not fetched (`DownloadParams.stream`)."""
        return self.download.stream and self.base.repo_id is not None

    def component_of(self, lora: str) -> str | None:
        """The component of the pipeline that a LoRA names; None where its keys say that."""
        return self.loras[lora].component if lora in self.loras else None

    @property
    def components(self) -> frozenset[str | None]:
        """The components that LoRAs name; None for those whose keys say it."""
        return frozenset(lora.component for lora in self.loras.values())

    @property
    def scheduler_config(self) -> dict[str, object]:
        """The scheduler's settings by diffusers' names; empty to keep the base's own."""
        return {} if self.scheduler is None else self.scheduler.model_dump()

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Recipe:
        """Check a tree of parameters; `where` is where it comes from, for the error message.

        Raises:
            BadConfig: a key is unknown, missing or ill-typed; the message names it.
        """
        return sections.parse_section(cls, values, where, "see conf/ for the keys")

    @model_validator(mode="after")
    def _scales_name_loras(self) -> Recipe:
        unknown = sorted(set(self.fuse.lora_scales) - set(self.loras))
        if unknown:
            raise ValueError(f"fuse.lora_scales names {unknown[0]!r}; the LoRAs are {', '.join(sorted(self.loras))}")
        return self
