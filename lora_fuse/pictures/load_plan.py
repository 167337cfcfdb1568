"""The sides of a run: what they share, the merged repository's, and all that are made from the base.

Nothing is loaded twice. First the text encoders, which encode the prompts of all cases and go; then the VAE; then the
merged denoisers (a transformer, two, or a UNet) for their side, and for those of exports, whose weights are copied into
them; and when those have gone the base's, for all the others, LoRAs beside them and their weights moved in place.
Merged and base are never in memory together.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fuse.checkpoint import dtypes
from lora_fuse.errors import OutOfMemory
from lora_fuse.pictures.calls.call_arguments import call_of
from lora_fuse.pictures.calls.encoded_prompts import Prompts
from lora_fuse.pictures.cases import Case, Sampling
from lora_fuse.pictures.picture import Rendered
from lora_fuse.pictures.placement import BARE, advice, place
from lora_fuse.pictures.render import (
    Pipeline,
    compile_blocks,
    encode_prompts,
    load_pipeline,
    make_scheduler,
    pipeline_class,
    render,
    shared_components,
)
from lora_fuse.pictures.render_progress import RenderProgress
from lora_fuse.pictures.unfused_lora import Attached, attach
from lora_fuse.pictures.weights_in_place import FloatArray, jitter, take_weights

if TYPE_CHECKING:
    import torch

    from lora_fuse.fusion import Plan
    from lora_fuse.pictures.pairs import Setup


GIVEN_BACK = "memory given back"


@dataclass(frozen=True, slots=True)
class References:
    """Pictures of one run that a merge is compared with, one a case and side; `unfused_by` as in `Pair`."""

    unfused: list[Rendered]
    floor: list[Rendered]
    baseline: Sequence[Rendered | None]
    unfused_by: str


@dataclass(frozen=True, slots=True)
class Shared:
    """Parts that all sides of a run share, by name, and the encoded prompts of every case.

    A part that is None is not loaded, as the text encoder where the prompts are here.
    """

    parts: Mapping[str, object]
    prompts: Mapping[tuple[object, ...], Prompts] = field(default_factory=dict)

    def prompts_of(self, case: Case, sampling: Sampling) -> Prompts | None:
        """The encoded prompts of a case; None leaves them to the pipeline's own text encoder."""
        return self.prompts.get((case, *sampling.beside_prompt))


def share_both(
    merged: Path, plan: Plan, cases: Sequence[Case], setup: Setup, watch: RenderProgress, base: Shared | None = None
) -> tuple[Shared, Shared]:
    """Give what the merged sides share and what those of the base do; `base` is the latter where it is loaded already.

    It is the same unless text encoders are fused too, whose prompts are others then.

    Raises:
        RenderFailed, OutOfMemory: see `share`.
    """
    if not _parts_beside(plan, setup):
        both = base or share(merged, cases, setup, watch)
        return both, both
    theirs = base or share(plan.checkpoint.root, cases, setup, watch)
    encoded = _encode(merged, cases, setup, watch)
    free_memory()
    return Shared({**theirs.parts, **encoded.parts}, encoded.prompts), theirs


def share(folder: Path, cases: Sequence[Case], setup: Setup, watch: RenderProgress | None = None) -> Shared:
    """Encode the prompts of all cases for all sides, give the text encoder's memory back, and load the VAE.

    Raises:
        RenderFailed: a part cannot be loaded or run.
        OutOfMemory: the GPU's memory is short; the message names the placement to try.
    """
    watch = watch or RenderProgress()
    with watch.loading("libraries"):
        pipeline_class(setup.pipeline)
    shared = _encode(folder, cases, setup, watch)
    with watch.spending(GIVEN_BACK):
        free_memory()
    pipe = _load(folder, setup, {**dict.fromkeys(setup.call.denoisers), **shared.parts}, watch, "VAE")
    return Shared({**shared.parts, **shared_components(pipe)}, shared.prompts)


def _encode(
    folder: Path,
    cases: Sequence[Case],
    setup: Setup,
    watch: RenderProgress,
    plan: Plan | None = None,
    *,
    moved: bool = False,
) -> Shared:
    """Encode the prompts of all cases; with a plan, with its LoRAs beside the text encoders of its base.

    These are `moved` by one rounding for the noise floor.
    """
    pipe = _load(folder, setup, dict.fromkeys((*setup.call.denoisers, "vae")), watch, "text encoder")
    if plan is not None:
        attach(pipe, plan)
    if plan is not None and moved:
        for part in _parts_beside(plan, setup):
            jitter(getattr(pipe, part.component), part.targets, _rounded_to(part, setup))
    with _advised(setup.placement), watch.spending("prompts"):
        place(pipe, setup.placement)
        samplings = {sampling.beside_prompt: sampling for sampling in setup.sides}
        prompts: dict[tuple[object, ...], Prompts] = {
            (case, *key): encode_prompts(pipe, case, sampling) for key, sampling in samplings.items() for case in cases
        }
    encoders = [name for name in pipe.components if name.startswith("text_encoder")]
    return Shared({**shared_components(pipe), **dict.fromkeys(encoders)}, prompts)


def _load(folder: Path, setup: Setup, parts: Mapping[str, object], watch: RenderProgress, what: str) -> Pipeline:
    """Load a pipeline but for `parts`, straight to where it is to run if that is one GPU."""
    device = "cuda" if setup.placement == "cuda" else "cpu"
    with _advised(setup.placement), watch.loading(what):
        return load_pipeline(folder, setup.pipeline, dtype=setup.dtype, shared=parts, device=device)


def render_merged(
    merged: Path, cases: Sequence[Case], setup: Setup, shared: Shared, watch: RenderProgress | None = None
) -> list[Rendered]:
    """Render every case from a merged repository.

    Raises:
        RenderFailed: see `render_pairs`.
        OutOfMemory: see `render_pairs`.
    """
    sides = MergedSides(merged, cases, setup, shared, watch)
    rendered = sides.merged()
    sides.drop()
    return rendered


class MergedSides:
    """The sides of a run that a merged repository's denoisers make: their own weights first, then those of exports."""

    def __init__(
        self, merged: Path, cases: Sequence[Case], setup: Setup, shared: Shared, watch: RenderProgress | None = None
    ) -> None:
        self._folder = merged
        self._cases = cases
        self._setup = setup
        self._shared = shared
        self._watch = watch or RenderProgress()
        self._pipe: Pipeline = None

    def merged(self) -> list[Rendered]:
        """Render every case as a user would load it.

        Raises:
            RenderFailed: see `render_pairs`.
            OutOfMemory: see `render_pairs`.
        """
        self._load()
        return self._render("merged")

    def exported(self, name: str, weights: Iterable[tuple[str, FloatArray]]) -> list[Rendered]:
        """Render every case with an export's weights in the place of the merged ones, which are gone then.

        Where a placement leaves hooks in the denoisers, they are loaded anew.

        Raises:
            BadCheckpoint: see `take_weights`.
            RenderFailed: see `render_pairs`.
            OutOfMemory: see `render_pairs`.
        """
        if self._pipe is None or self._setup.placement not in BARE:
            self.drop()
            self._load()
        with self._watch.loading(f"export {name}"):
            take_weights(getattr(self._pipe, self._setup.call.denoisers[0]), weights, name)
        return self._render(f"export {name}")

    def drop(self) -> None:
        """Give the denoisers' memory back."""
        if self._pipe is not None:
            with self._watch.spending(GIVEN_BACK):
                drop_denoisers(self._pipe)
        self._pipe = None

    def _load(self) -> None:
        self._pipe = _load(
            self._folder, self._setup, self._shared.parts, self._watch, f"merged {self._setup.call.denoisers[0]}"
        )
        if self._setup.compiled:
            _compile(self._pipe)

    def _render(self, side: str) -> list[Rendered]:
        setup = self._setup
        return render_all(
            self._pipe, self._cases, setup.sampling, setup.placement, side=side, watch=self._watch, shared=self._shared
        )


class BaseSides:
    """The sides of a run that are made from the base: its denoisers are loaded once, and LoRAs come and go beside them.

    Where a placement leaves hooks in them, they are loaded anew for other LoRAs.
    """

    def __init__(
        self, base: Path, cases: Sequence[Case], setup: Setup, shared: Shared, watch: RenderProgress | None = None
    ) -> None:
        self._base = base
        self._cases = cases
        self._setup = setup
        self._shared = shared
        self._watch = watch or RenderProgress()
        self._pipe: Pipeline = None
        self._scheduler: object = None  # the base's own
        self._attached: Attached | None = None
        self._encoded: Shared | None = None  # with LoRAs beside the text encoders

    def alone(self) -> list[Rendered]:
        """Render every case as the base's authors run it: no LoRA, its own scheduler, the settings of `baseline`.

        Raises:
            RenderFailed: see `render_pairs`.
            OutOfMemory: see `render_pairs`.
        """
        pipe = self._without_loras()
        pipe.register_modules(scheduler=self._scheduler)
        return self._render(self._setup.baseline or self._setup.sampling, "base alone")

    def beside(self, plan: Plan | None, side: str) -> list[Rendered]:
        """Render every case with the recipe's scheduler and the LoRAs of a plan, or none, beside the base.

        Raises:
            RenderFailed: see `render_pairs`.
            OutOfMemory: see `render_pairs`.
        """
        pipe = self._without_loras()
        if self._setup.scheduler:
            pipe.register_modules(scheduler=make_scheduler(self._setup.scheduler))
        if plan is not None:
            with self._watch.spending("LoRAs beside it"):
                self._attached = attach_beside(pipe, plan)
            self._encode_beside(plan)
        return self._render(self._setup.sampling, side)

    def _encode_beside(self, plan: Plan, *, moved: bool = False) -> None:
        """Encode the prompts with LoRAs beside the text encoders, where they are for those too."""
        self._encoded = None
        if _parts_beside(plan, self._setup):
            encoded = _encode(self._base, self._cases, self._setup, self._watch, plan, moved=moved)
            self._encoded = Shared(self._shared.parts, encoded.prompts)

    def references(self, plan: Plan) -> References:
        """Render every case from the base alone if asked, with the LoRAs beside it, and with its weights moved.

        The weights stay moved, so that this comes last; the denoisers' memory is given back.

        Raises:
            RenderFailed: see `render_pairs`.
            OutOfMemory: see `render_pairs`.
        """
        setup = self._setup
        alone: Sequence[Rendered | None] = [None] * len(self._cases) if setup.baseline is None else self.alone()
        unfused = self.beside(plan, "unfused")
        by = self._attached.by if self._attached else ""
        with self._watch.spending("noise floor"):
            for part in plan.parts:
                if part.component in setup.call.denoisers:
                    jitter(getattr(self._pipe, part.component), part.targets, _rounded_to(part, setup))
        self._encode_beside(plan, moved=True)
        floor = self._render(setup.sampling, "floor")
        self.drop()
        return References(unfused, floor, alone, by)

    def drop(self) -> None:
        """Give the denoisers' memory back."""
        if self._pipe is not None:
            with self._watch.spending(GIVEN_BACK):
                drop_denoisers(self._pipe)
        self._pipe = None
        self._attached = None

    def _without_loras(self) -> Pipeline:
        if self._pipe is not None and self._setup.placement not in BARE:
            self.drop()
        if self._pipe is None:
            self._pipe = _load(
                self._base, self._setup, self._shared.parts, self._watch, f"base {self._setup.call.denoisers[0]}"
            )
            self._scheduler = self._pipe.scheduler
        if self._attached is not None:
            self._attached.detach(self._pipe)
            self._attached = None
        self._encoded = None
        return self._pipe

    def _render(self, sampling: Sampling, side: str) -> list[Rendered]:
        if self._setup.compiled:
            _compile(self._pipe)
        return render_all(
            self._pipe,
            self._cases,
            sampling,
            self._setup.placement,
            side=side,
            watch=self._watch,
            shared=self._encoded or self._shared,
        )


def _parts_beside(plan: Plan, setup: Setup) -> list[Plan]:
    """The parts of a plan that are no denoisers: text encoders."""
    return [part for part in plan.parts if part.component not in setup.call.denoisers]


def _rounded_to(plan: Plan, setup: Setup) -> list[torch.dtype]:
    """The dtypes that the changed weights are rounded to, in memory and on disk."""
    import torch

    stored = {plan.written(target.tensor) for target in plan.targets.values()}
    return [getattr(torch, setup.dtype), *(dtypes.DTYPES[name].torch for name in stored)]


def attach_beside(pipe: Pipeline, plan: Plan) -> Attached:
    """Attach the LoRAs while the parts that are placed already are out of sight.

    diffusers takes what accelerate has spread over GPUs for offloaded, and would then offload the denoisers too.
    """
    placed = shared_components(pipe)
    pipe.register_modules(**dict.fromkeys(placed))
    attached = attach(pipe, plan)
    pipe.register_modules(**placed)
    return attached


def render_all(
    pipe: Pipeline,
    cases: Iterable[Case],
    sampling: Sampling,
    placement: str,
    *,
    side: str = "",
    watch: RenderProgress | None = None,
    shared: Shared | None = None,
) -> list[Rendered]:
    """Place a pipeline, and render every case with it; `side` is its name in the progress.

    Prompts are those of `shared`, and where it has none the pipeline's own text encoder encodes them.

    Raises:
        RenderFailed: it cannot be run.
        OutOfMemory: the GPU's memory is short; the message names the placement to try.
    """
    watch = watch or RenderProgress()
    prompts_of = (shared or Shared({})).prompts_of
    rendered = []
    place(pipe, placement)
    with _advised(placement):
        for case in cases:
            with watch.picture(side, case.name, sampling) as on_step:
                rendered.append(render(pipe, case, sampling, on_step, prompts_of(case, sampling)))
            watch.made(side, case.name, rendered[-1])
    return rendered


@contextmanager
def _advised(placement: str) -> Iterator[None]:
    """Name the placement to try in what is raised where memory is short."""
    try:
        yield
    except OutOfMemory as error:
        said = str(error)
        raise OutOfMemory(said if advice(placement) in said else f"{said}, {advice(placement)}") from error


def drop_denoisers(pipe: Pipeline) -> None:
    """Give the memory back before others are loaded."""
    pipe.register_modules(**dict.fromkeys(call_of(type(pipe).__name__).denoisers))
    free_memory()


def _compile(pipe: Pipeline) -> None:
    for name in call_of(type(pipe).__name__).denoisers:
        if (model := getattr(pipe, name)) is not None:
            compile_blocks(model)


def free_memory() -> None:
    """Give back what nothing refers to any more, on the GPU too."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # without a GPU it does nothing
