"""Pictures from a diffusers folder, with or without LoRAs: the only module that knows diffusers and transformers.

Nothing is fetched or asked, no code of a base runs, the libraries print nothing, and what they let pass with a warning
(a LoRA of which no layer was loaded) is refused. They are imported inside the functions: three seconds that a no-op
must not pay.
"""

from __future__ import annotations

import inspect
import os
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import fitness
from lora_fuse.errors import LoraFuseError, OutOfMemory, RenderFailed, require
from lora_fuse.machine import text
from lora_fuse.pictures.calls import clip
from lora_fuse.pictures.calls.call_arguments import arguments, call_of
from lora_fuse.pictures.calls.encoded_prompts import AbsentModel, Prompts, PromptsEncoded, recorded, replayed
from lora_fuse.pictures.cases import Case, Sampling
from lora_fuse.pictures.environment import sealed, uncollected
from lora_fuse.pictures.picture import Levels, Rendered
from lora_fuse.pictures.render_progress import Meter

Pipeline: TypeAlias = Any  # a diffusers.DiffusionPipeline; diffusers is not typed

DTYPES = ("float32", "bfloat16", "float16")


def quiet_libraries() -> None:
    """Turn off the progress bars and the warnings of diffusers, transformers and the Hub client, process-wide.

    diffusers is told to load the shards of a model side by side, which it reads when it is imported.
    """
    os.environ.setdefault("HF_ENABLE_PARALLEL_LOADING", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # before diffusers: importing it makes transformers warn
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


def allow_missing_torchvision() -> None:
    """Let the processors of Qwen VL be loaded where torchvision is not installed; elsewhere do nothing.

    transformers has no video processor without torchvision, and they insist on one although the pipelines never pass
    it a video. CPU builds of torch come without torchvision, so its name is taken off the list of a processor's parts.
    """
    from transformers import Qwen2VLProcessor, Qwen3VLProcessor
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():
        for processor in (Qwen2VLProcessor, Qwen3VLProcessor):
            processor.get_attributes = classmethod(lambda _: ["image_processor", "tokenizer"])


def pipeline_class(pipeline: str) -> Any:
    """Import the libraries, quiet, and return the class of a pipeline.

    Raises:
        RenderFailed: see `call_of`.
        MissingExtra: a library that the class calls is not installed.
    """
    for library in call_of(pipeline).needs:
        require(library, pipeline)
    with uncollected("diffusers"):
        quiet_libraries()
        allow_missing_torchvision()
        import diffusers

        return getattr(diffusers, pipeline)


@contextmanager
def condition_area(pixels: int | None) -> Iterator[None]:
    """Within it, the edit pipelines scale input pictures to `pixels` in all, where they would to a megapixel or more.

    They have no argument for it; every size that they choose comes from one function in the module of each. A model
    that was trained on small pictures needs it. None changes nothing.
    """
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    modules = (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus) if pixels else ()
    own = [module.calculate_dimensions for module in modules]

    def limited(choose: Callable[[float, float], Any]) -> Callable[[float, float], Any]:
        return lambda area, ratio: choose(min(area, pixels or area), ratio)

    for module in modules:
        module.calculate_dimensions = limited(module.calculate_dimensions)
    try:
        yield
    finally:
        for module, function in zip(modules, own, strict=True):
            module.calculate_dimensions = function


@sealed()
def load_pipeline(
    folder: Path, pipeline: str, *, dtype: str, shared: Mapping[str, object] | None = None, device: str = "cpu"
) -> Pipeline:
    """Load a diffusers folder as the named pipeline class, whichever class its model_index.json names.

    The folder is complete: nothing is looked up elsewhere. Weights stored in another dtype are converted; with the
    device ``cuda`` they go straight from the files to the GPU, and no copy of a model is made in the main memory. Of
    `shared`, parts of another pipeline (see `shared_components`), those that this one has no use for are left out; a
    part that is None there is not loaded, and a denoiser among them is stood for by its configuration. The chat
    templates of the folder are taken off, so that none is ever rendered, unless the class needs them: transformers
    renders those shut in.

    Raises:
        RenderFailed: the class or dtype is unknown, the folder asks for code, or it cannot be loaded as that class.
        OutOfMemory: the GPU's memory is short.
    """
    call = call_of(pipeline)
    if dtype not in DTYPES:
        raise RenderFailed(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    if not (folder / "model_index.json").is_file():
        raise RenderFailed(f"{folder} has no model_index.json: give the folder of a whole diffusers pipeline")
    fitness.refuse_unloadable(folder, RenderFailed)
    kind = pipeline_class(pipeline)
    import torch

    parts = {name: part for name, part in (shared or {}).items() if name in inspect.signature(kind).parameters}
    straight = None if device == "cpu" else device
    try:
        pipe = kind.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            device_map=straight,
            local_files_only=True,
            trust_remote_code=False,
            **parts,
        )
    except Exception as error:  # a broken configuration may raise anything in the libraries
        where = folder / (_part_of(error) or "")
        if isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in str(error):
            raise OutOfMemory(f"{where} does not fit the GPU's memory") from error
        raise RenderFailed(f"{where} cannot be loaded as {pipeline}: {_named(error)}") from error
    pipe.hf_device_map = None  # every part is on one device, and may be moved from it
    pipe.set_progress_bar_config(disable=True)
    for name in call.denoisers:
        if getattr(pipe, name) is None and (config := folder / name / "config.json").is_file():
            vars(pipe)[name] = AbsentModel(config, getattr(torch, dtype))
    if not call.has_templates:
        _take_off_templates(pipe)
    return pipe


def _take_off_templates(pipe: Pipeline) -> None:
    parts = list(pipe.components.values())
    parts += [part.tokenizer for part in parts if hasattr(part, "tokenizer")]
    for part in parts:
        if getattr(part, "chat_template", None) is not None:
            part.chat_template = None


def _part_of(error: Exception) -> str | None:
    """The component that diffusers was loading when it failed: an argument of its function for one."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "load_sub_model"]
    return str(frames[0].f_locals.get("name", "")) if frames else None


def make_scheduler(config: Mapping[str, object]) -> object:
    """A scheduler from its settings: of the class that they name, else FlowMatchEulerDiscreteScheduler.

    Raises:
        RenderFailed: there is no such class, or it takes other settings.
    """
    import diffusers

    name = str(config.get("_class_name", "FlowMatchEulerDiscreteScheduler"))
    kind = getattr(diffusers, name, None)
    known = inspect.signature(kind).parameters if kind else {}
    unknown = [key for key in config if key not in known and key[:1] != "_"]
    if kind is None or unknown:
        raise RenderFailed(
            f"scheduler: {name} has no {unknown[0]!r}, its settings are {', '.join(known)}"
            if kind
            else f"scheduler: diffusers {diffusers.__version__} has no {name}; take another class"
        )
    try:
        return kind.from_config(dict(config))
    except (TypeError, ValueError) as error:
        raise RenderFailed(f"scheduler: {name} cannot be made of these settings: {_named(error)}") from error


def compile_blocks(model: Any) -> None:
    """Compile the blocks that a diffusers model repeats, for pictures of any size: which came first is of no matter.

    Raises:
        RenderFailed: the model names no such blocks.
    """
    import torch._dynamo.config
    import torch._inductor.config

    torch._dynamo.config.fail_on_recompile_limit_hit = True  # never on without, which would be other bits
    torch._inductor.config.deterministic = True
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex operators")
    try:
        model.compile_repeated_blocks(dynamic=True)
    except (AttributeError, ValueError) as error:
        blocks = f"{type(model).__name__} has no blocks to compile ({text.one_line(error)})"
        raise RenderFailed(f"{blocks}; set regress.compile to false") from error


def shared_components(pipe: Pipeline, own: Collection[str] = ()) -> dict[str, object]:
    """Everything that two pipelines for the same base can share: all but denoisers, `own`, and the scheduler."""
    not_shared = {*call_of(type(pipe).__name__).denoisers, *own, "scheduler"}
    return {name: part for name, part in pipe.components.items() if name not in not_shared and part is not None}


@sealed()
def encode_prompts(pipe: Pipeline, case: Case, sampling: Sampling) -> Prompts:
    """Encode a case's prompt, and with guidance the negative one, by a pipeline that needs no denoiser and no VAE.

    The pipeline's call itself prepares what its text encoder sees, the input pictures with it, and goes no further.

    Raises:
        RenderFailed: an input picture cannot be read, their number does not suit the pipeline, or that cannot run.
        OutOfMemory: the GPU's memory is short.
    """
    given = arguments(pipe, case, sampling)
    prompts = recorded(pipe, lambda: _run(pipe, case, sampling, given))
    if not prompts:
        raise RenderFailed(f"{type(pipe).__name__} made case {case.name} without encoding its prompt")
    return prompts


@sealed()
def render(
    pipe: Pipeline,
    case: Case,
    sampling: Sampling,
    on_step: Callable[[], None] = lambda: None,
    prompts: Prompts | None = None,
) -> Rendered:
    """Make one picture, the noise drawn on the CPU so that every device starts from the same.

    The pipeline is loaded and placed; `on_step` is called at the end of every denoising step. With `prompts`, of
    `encode_prompts`, it needs no text encoder, and the picture is the same. A clip is a picture of its first, middle
    and last frame, with all of them beside it.

    Raises:
        RenderFailed: an input picture cannot be read, their number does not suit the pipeline, or that cannot run.
        OutOfMemory: the GPU's memory is short.
    """
    given = arguments(pipe, case, sampling)
    meter = Meter()
    final: dict[str, Any] = {}

    def after_step(_: Pipeline, __: int, ___: object, tensors: dict[str, Any]) -> dict[str, Any]:
        meter.step()
        on_step()
        final.update(tensors)
        return {}

    with replayed(pipe, prompts):
        output = _run(pipe, case, sampling, given | {"callback_on_step_end": after_step})
    cost = meter.stop()
    latents = final["latents"].detach().float().cpu().numpy()
    sigmas = tuple(float(sigma) for sigma in getattr(pipe.scheduler, "sigmas", ()))  # LCM and DDIM have none
    rate = call_of(type(pipe).__name__).frames_per_second
    if rate is not None:
        frames, nonfinite = to_levels(output.frames[0])
        shown = Rendered(clip.shown_frames(frames), nonfinite, latents=latents, sigmas=sigmas, cost=cost)
        return replace(shown, frames=frames, frames_per_second=rate, clip=clip.measured(frames))
    levels, nonfinite = to_levels(output.images[0])
    return Rendered(levels, nonfinite, latents=latents, sigmas=sigmas, cost=cost)


def _run(pipe: Pipeline, case: Case, sampling: Sampling, arguments: Mapping[str, Any]) -> Any:
    """Call a pipeline, and name the case in what goes wrong."""
    import torch

    try:
        with condition_area(sampling.condition_area):
            return pipe(**arguments)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"case {case.name} does not fit the GPU's memory") from error
    except (LoraFuseError, PromptsEncoded):
        raise
    except Exception as error:  # a configuration that loads may still not fit together
        raise RenderFailed(f"{type(pipe).__name__} cannot make case {case.name}: {_named(error)}") from error


def to_levels(values: npt.NDArray[np.float32]) -> tuple[Levels, int]:
    """Round a picture or clip, (..., height, width, 3) in [0, 1], and count what is not finite, which becomes 0.

    A fourth channel is how much it covers: what shows is the picture over white, as Qwen-Image 2.1's text encoder is
    shown one.
    """
    finite = np.isfinite(values)
    shown = np.where(finite, values, 0.0)
    if shown.shape[-1] == 4:
        cover = shown[..., 3:]
        shown = shown[..., :3] * cover + (1 - cover)
    return (shown * 255).round().astype(np.uint8), int((~finite).sum())


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {text.one_line(error)}"
