"""Renders the points of a sweep in one process: what they share of the base is loaded once.

Text encoder, VAE, tokenizer and processor of a merged repository are the base's, byte for byte (`verify` holds it to
that), so the base's are used for every point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_fuse.fusion import Plan
from lora_fuse.pictures import Case, pairs, picture, render


@dataclass(slots=True)
class Renderer:
    """Holds the parts of one base, for one pipeline class, dtype and placement; another base takes their place."""

    _of: tuple[object, ...] = ()
    _parts: Mapping[str, object] = field(default_factory=dict)

    def alone(self, base: Path, cases: Sequence[Case], setup: pairs.Setup) -> list[picture.Rendered]:
        """Render every case from the base without a LoRA, with its own scheduler and the settings of `setup.baseline`.

        Raises:
            RenderFailed: see `lora_fuse.pictures.pairs.render_pairs`.
        """
        pipe = render.load_pipeline(base, setup.pipeline, dtype=setup.dtype, shared=self._shared(base, setup))
        rendered = pairs.render_all(pipe, cases, setup.baseline or setup.sampling, setup.placement)
        pairs.drop_transformer(pipe)
        return rendered

    def sides(self, merged: Path, plan: Plan, cases: Sequence[Case], setup: pairs.Setup) -> list[pairs.Pair]:
        """Render every case from both sides, see `lora_fuse.pictures.pairs.render_pairs`.

        Raises:
            RenderFailed: as there.
        """
        return pairs.render_pairs(merged, plan, cases, setup, shared=self._shared(plan.checkpoint.root, setup))

    def _shared(self, base: Path, setup: pairs.Setup) -> Mapping[str, object]:
        of = (base, setup.pipeline, setup.dtype, setup.placement)
        if of != self._of:
            self._parts = {}  # the memory of the last ones first
            pipe = render.load_pipeline(base, setup.pipeline, dtype=setup.dtype, shared={"transformer": None})
            self._of = of
            self._parts = render.shared_components(pipe)
        return self._parts
