"""The sections of a recipe, typed and checked strictly. `params.yaml` has exactly these keys.

An unknown, missing or ill-typed key is an error that names the key; no default stands in for a missing one, because
`conf/` is the only place where values come from.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic import Tag as UnionTag

from lora_fuse.errors import BadConfig
from lora_fuse.lora import Selection
from lora_fuse.machine import files
from lora_fuse.models import pipeline_call
from lora_fuse.recipe.records import key_path

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _check_name(name: str) -> str:
    """Return a name that is one part of a path, as a recipe's becomes folders and files.

    Raises:
        ValueError: it is none.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{_short(name)} cannot name a file; take up to 64 of A-Z a-z 0-9 . _ -, no mark first")
    return name


Name = Annotated[str, AfterValidator(_check_name)]  # of a recipe, a variant, a LoRA
CaseName = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")]  # part of file names and of flat metric keys
Tag = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Device = Literal["auto", "cpu", "cuda"]
Placement = Literal["cuda", "model_offload", "group_offload", "balanced", "cpu"]
DType = Literal["float32", "bfloat16", "float16"]
Weights = Literal["full", "recipe"]


class Section(BaseModel):
    """A section of the parameters: frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, serialize_by_alias=True)


class Source(Section):
    """A Hub repository at a revision, or a local folder relative to the project; exactly one of the two."""

    repo_id: Text | None
    path: Text | None
    revision: Text | None

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.repo_id is None) == (self.path is None):
            raise ValueError(f"set exactly one of repo_id ({self.repo_id}) and path ({self.path}), the other null")
        if (self.repo_id is None) != (self.revision is None):
            raise ValueError(f"a repo_id needs a revision and a path has none: got revision {self.revision}")
        return self

    @property
    def label(self) -> str:
        """The repository's id or the path."""
        return self.repo_id or self.path or ""

    @property
    def place(self) -> tuple[str | None, str | None, str | None]:
        """Repository, path and revision: equal for everything that comes from the same place."""
        return self.repo_id, self.path, self.revision

    @property
    def key(self) -> str:
        """A name that is one part of a path: readable, and with eight digits of a hash of place and revision."""
        named = [self.label, self.revision]
        digest = hashlib.sha256(json.dumps(named).encode()).hexdigest()
        readable = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(filter(None, named))).strip("-")
        return f"{readable[:60]}-{digest[:8]}"


class SamplingParams(Section):
    """The settings that a model is meant to be run with."""

    steps: PositiveInt
    true_cfg_scale: Finite
    negative_prompt: str | None

    @property
    def usage(self) -> dict[str, Any]:
        """The arguments of the pipeline's call, by the names of `lora_fuse.pictures.cases.Sampling`."""
        return self.model_dump(include=set(SamplingParams.model_fields))


class RecipeSamplingParams(SamplingParams):
    """The merged model's settings; `sigmas` are those it has to visit, without the final 0, or null if that is open.

    `call_sigmas` go into the pipeline's call, where the scheduler may still shift them; most pipelines need none.
    """

    sigmas: list[Finite] | None
    call_sigmas: list[Finite] | None = None

    @model_validator(mode="after")
    def _one_sigma_a_step(self) -> RecipeSamplingParams:
        for sigmas in (self.sigmas, self.call_sigmas):
            if sigmas is not None and len(sigmas) != self.steps:
                raise ValueError(f"{self.steps} steps visit as many sigmas: got {len(sigmas)}, {sigmas}")
        return self

    @property
    def usage(self) -> dict[str, Any]:
        """Arguments of `SamplingParams`, and the sigmas that go into the call."""
        return super().usage | ({"call_sigmas": tuple(self.call_sigmas)} if self.call_sigmas else {})


class BaseParams(Source):
    """The base model, the diffusers pipeline class that runs it, and its settings without a LoRA.

    `condition_area`: pixels that input pictures are scaled to; null leaves it to the pipeline (a megapixel).
    """

    pipeline: Text
    condition_area: PositiveInt | None
    sampling: SamplingParams


class LoraParams(Source):
    """One LoRA of a repository or folder: `filename` is a safetensors file in it or a PEFT folder (``.``: itself).

    `component` is the folder of the pipeline's component that it is for; without one its keys say that, each for
    itself.
    """

    filename: Text
    component: Name | None = None


class FuseParams(Section):
    """Settings of a fuse: `scale` multiplies every LoRA's own entry in `lora_scales` (1.0 where there is none).

    `only`, `skip` and `scales` are patterns of modules, `leave_out` of keys of LoRAs, see `lora_fuse.lora.inputs`;
    `untouched` is how weights that do not change are taken over, see `lora_fuse.machine.files.take_over`. With `inputs`
    ``stat``, what was hashed by `download` is known to be the same by its state (`lora_fuse.machine.file_state`); with
    ``hash``, every byte of base and LoRAs is hashed as it is read, too. `dtype` is that of all floats of the result,
    null the base's own.
    """

    scale: Finite
    lora_scales: dict[str, Finite]
    only: list[Text]
    skip: list[Text]
    scales: dict[str, Finite]
    leave_out: list[Text]
    dtype: DType | None
    device: Device
    untouched: files.Untouched
    inputs: Literal["stat", "hash"]

    def scale_of(self, lora: str) -> float:
        """The scale that is applied to one LoRA."""
        return self.scale * self.lora_scales.get(lora, 1.0)

    @property
    def growth(self) -> int:
        """Size of the fused weights, in times of weights of 16 bits."""
        return 2 if self.dtype == "float32" else 1

    @property
    def selection(self) -> Selection:
        """The modules that are fused, and the keys that are left out."""
        return Selection(tuple(self.only), tuple(self.skip), self.scales, tuple(self.leave_out))


class SchedulerParams(Section):
    """FlowMatchEulerDiscreteScheduler's settings, under its own names."""

    base_image_seq_len: PositiveInt
    base_shift: Finite
    invert_sigmas: bool
    max_image_seq_len: PositiveInt
    max_shift: Finite
    num_train_timesteps: PositiveInt
    shift: Finite
    shift_terminal: Finite | None
    stochastic_sampling: bool
    time_shift_type: Literal["exponential", "linear"]
    use_beta_sigmas: bool
    use_dynamic_shifting: bool
    use_exponential_sigmas: bool
    use_karras_sigmas: bool


class NamedSchedulerParams(Section):
    """Settings of another scheduler of diffusers, under its own names; those that are left out are its defaults."""

    model_config = ConfigDict(extra="allow", validate_by_name=False)

    kind: Literal[pipeline_call.SCHEDULERS] = Field(alias="_class_name")  # type: ignore[valid-type]


UNNAMED = "FlowMatchEuler's settings"  # tags of the two kinds; part of no key
NAMED = "a class and its settings"


def _kind_of_scheduler(given: object) -> str:
    names_a_class = isinstance(given, NamedSchedulerParams) or (isinstance(given, dict) and "_class_name" in given)
    return NAMED if names_a_class else UNNAMED


AnyScheduler = Annotated[
    Annotated[SchedulerParams, UnionTag(UNNAMED)] | Annotated[NamedSchedulerParams, UnionTag(NAMED)],
    Discriminator(_kind_of_scheduler),
]


class DownloadParams(Section):
    """Files fetched at once, and seconds without a byte after which a transfer has stalled and is tried another way.

    With `stream` a base on the Hub is not fetched, but fused while it arrives.
    """

    workers: PositiveInt
    stall_seconds: Positive
    stream: bool = False


class VerifyParams(Section):
    """`rows`: rows of each target to re-derive, or ``all``."""

    rows: PositiveInt | Literal["all"]


class CaseParams(Section):
    """One golden image: its input pictures (paths), prompt and seed; null sizes leave the choice to the pipeline.

    `frames` is the length of a clip, of a pipeline that makes one.
    """

    images: list[Text]
    prompt: Text
    seed: int
    height: PositiveInt | None
    width: PositiveInt | None
    frames: PositiveInt | None = None


class LimitParams(Section):
    """Limits that two pictures must keep, by the metrics of `lora_fuse.pictures.metrics`; a null decides nothing.

    The last two are of clips, and may be left out.
    """

    psnr_db: Finite | None
    max_abs: Finite | None
    mean_abs: Finite | None
    changed_share: Finite | None
    ssim: Finite | None
    ssimulacra2: Finite | None
    flip: Finite | None
    flip_worst: Finite | None
    comb_db: Finite | None
    flicker: Finite | None = None
    motion: Finite | None = None

    @model_validator(mode="after")
    def _something_decides(self) -> LimitParams:
        if not self.bounds:
            raise ValueError("every limit is null, so every picture would pass; set one")
        return self

    @property
    def bounds(self) -> dict[str, float]:
        """The limits that decide."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


# Limits of an export in one format, see `lora_fuse.regression.exported`. Of its weights: relative L2 error of a matrix,
# distance from what the format makes of the exact sum, and how far from 1 the share of the LoRA may be that is left.
# Of its pictures against the merged ones: latents in noise floors, and metrics of two pictures.
OfPictures = Literal["psnr_db", "mean_abs", "ssimulacra2", "flip", "flip_worst", "comb_db"]
ExportLimit = Literal["worst_l2", "from_best", "kept", "over_floor", OfPictures]
ExportLimits = Annotated[dict[ExportLimit, Positive], Field(min_length=1)]


class RegressParams(Section):
    """The cases to render, the device for it, and how far pictures may be apart.

    `threads` are torch's on the CPU, null its own choice; `baseline` adds the base alone to the report; `over_floor` is
    how many times the noise floor the latents of merged and unfused may be apart, null decides nothing; `compile`
    compiles the transformer's blocks, which pays for many pictures; `exports` are limits by format,
    and what has none there decides nothing.
    """

    placement: Placement
    dtype: DType
    threads: PositiveInt | None
    compile: bool
    baseline: bool
    over_floor: Finite | None
    cases: Annotated[dict[CaseName, CaseParams], Field(min_length=1)]
    unfused: LimitParams
    golden: LimitParams
    exports: dict[str, ExportLimits]

    @model_validator(mode="after")
    def _compiled_where_it_lies(self) -> RegressParams:
        if self.compile and self.placement not in ("cuda", "cpu"):
            raise ValueError(f"compile needs placement cuda or cpu, and it is {self.placement}: set compile to false")
        return self


class ValidationParams(Section):
    """Bounds for a new version of a LoRA; `conf/config.yaml` has the values and what they separate."""

    teacher: bool  # for a LoRA that saves steps, also render the base alone at its own steps
    # The cosine that its effect has to have with the current one's, at least, in the middle case.
    alignment: Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
    # How many times as strong as the current one it may be, and how many times weaker.
    strength: Annotated[float, Field(gt=1, allow_inf_nan=False)]
    # The share of the current one's gain that it has to keep, on average.
    gain_kept: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    noise: Positive  # how many times the noise of the noisiest other picture of a case it may have
    comb_db: Positive  # a grid's, in the difference to the current picture and to the one without the LoRA, in dB


class ExportParams(Section):
    """Other formats that the merged checkpoint is written in, by the names of `lora_fuse.exports.formats.FORMATS`.

    `keep` are patterns of layers that stay as they are, beside those of `lora_fuse.models.families`. `fp8_scale` is
    that of a matrix in fp8, `fp8_seed` rounds to fp8 by chance, `sd_cli` is the program that makes ggml's K types.
    """

    formats: list[Text]
    keep: list[Text]
    fp8_scale: Literal["power_of_two", "largest"]
    fp8_seed: Annotated[int, Field(ge=0)] | None
    sd_cli: Text


@dataclass(frozen=True, slots=True)
class Signer:
    """The signer: the private key in a file, or with None the identity that this machine has for Sigstore."""

    key: Path | None


class SigningParams(Section):
    """The signer of what is published: a private key in a file, or keyless by Sigstore; nobody if neither is set."""

    key: Text | None
    keyless: bool

    @model_validator(mode="after")
    def _one_signer(self) -> SigningParams:
        if self.key is not None and self.keyless:
            raise ValueError(f"set key ({self.key}) or keyless, not both")
        return self

    @property
    def signer(self) -> Signer | None:
        """The signer; None leaves the release unsigned."""
        if self.key is not None:
            return Signer(Path(self.key))
        return Signer(None) if self.keyless else None


class PublishParams(Section):
    """The place of the merged repository on the Hub, if it is published, its licence, and its signer.

    `license` is an id of the Hub that somebody states by hand; null takes what base and LoRAs state. With `weights`
    ``recipe`` the repository has all but the weights: what is signed there is enough to make them again.
    """

    enabled: bool
    repo_id: Text | None
    weights: Weights
    private: bool
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")] | None
    signing: SigningParams
    tag: Tag | None

    @model_validator(mode="after")
    def _tag_names_nothing_else(self) -> PublishParams:
        if self.tag == "main" or re.fullmatch(r"[0-9a-f]{7,40}", self.tag or ""):
            raise ValueError(f"the tag {self.tag} would be taken for a branch or a commit; take another name, v1")
        return self


SectionT = TypeVar("SectionT", bound=Section)


def parse_section(kind: type[SectionT], values: object, where: str, remedy: str) -> SectionT:
    """Check a tree of plain mappings and scalars from `where`; `remedy` ends the message of a refusal.

    Raises:
        BadConfig: a key is unknown, missing or ill-typed; the message names it.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = key_path(part for part in first["loc"] if part not in (UNNAMED, NAMED))
        more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise BadConfig(f"{where}: {key}: {first['msg']}, got {_short(first['input'])}{more}; {remedy}") from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
