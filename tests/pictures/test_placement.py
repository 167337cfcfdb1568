"""Laws of placement: each is known to the recipe, and where memory is short the next one is named."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from lora_fuse.errors import OutOfMemory, RenderFailed
from lora_fuse.pictures.cases import Case, Sampling
from lora_fuse.pictures.pairs import render_all
from lora_fuse.pictures.placement import PLACEMENTS, advice, place
from lora_fuse.pictures.render import Pipeline, load_pipeline
from lora_fuse.recipe.sections import Placement

POCKET = Path(__file__).resolve().parents[2] / "pocket"
GPU = [name for name in PLACEMENTS if name != "cpu"]
ORDER = ["cuda", "balanced", "model_offload", "group_offload", "cpu"]  # by how much of a GPU's memory they take
CASE, SAMPLING = Case("cat", "a cat", 0, height=64, width=64), Sampling(2, 1.0, " ")


@pytest.fixture
def pipe() -> Pipeline:
    return load_pipeline(POCKET / "model", "QwenImagePipeline", dtype="float32")


def test_a_recipe_knows_every_placement() -> None:
    assert set(get_args(Placement)) == set(PLACEMENTS) == set(ORDER)


def test_an_unknown_placement_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(RenderFailed, match=r"unknown placement 'disk': use one of cuda, .*, cpu"):
        place(None, "disk")


@pytest.mark.parametrize("placement", GPU)
def test_where_memory_is_short_a_placement_that_takes_less_is_named(placement: str) -> None:
    said = advice(placement)
    assert f"with regress.placement {placement}: set it to " in said
    named = [name for name in ORDER if name in said.partition("set it to")[2]]
    assert named
    assert min(ORDER.index(name) for name in named) > ORDER.index(placement)


def test_a_pipeline_on_the_cpu_stays_there(pipe: Pipeline) -> None:
    place(pipe, "cpu")
    assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"cpu"}


@pytest.mark.parametrize("placement", GPU)
def test_memory_that_runs_out_while_rendering_is_one_sentence_with_the_case_and_the_way_out(
    pipe: Pipeline, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transformer raises what torch raises; where parts lie is of no matter to that."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    pipe.transformer.register_forward_pre_hook(full)
    monkeypatch.setattr("lora_fuse.pictures.placement.PLACEMENTS", {placement: lambda _: None})
    with pytest.raises(OutOfMemory) as caught:
        render_all(pipe, [CASE], SAMPLING, placement)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message == f"case cat does not fit the GPU's memory, {advice(placement)}"


@pytest.mark.parametrize("placement", GPU)
def test_memory_that_runs_out_while_placing_is_one_sentence_with_the_way_out(
    placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Pipeline) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("lora_fuse.pictures.placement.PLACEMENTS", {placement: full})
    with pytest.raises(OutOfMemory, match=r"the pipeline does not fit the GPU's memory, with regress\.placement"):
        place(None, placement)


def test_the_next_case_is_rendered_as_ever_once_memory_is_there_again(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_fuse.pictures.placement.PLACEMENTS", dict.fromkeys(("cuda", "cpu"), lambda _: None))
    raised: list[int] = []

    def full_once(*_: object) -> None:
        if not raised:
            raised.append(1)
            raise torch.OutOfMemoryError

    pipe.transformer.register_forward_pre_hook(full_once)
    with pytest.raises(OutOfMemory, match="cat"):
        render_all(pipe, [CASE], SAMPLING, "cuda")
    (rendered,) = render_all(pipe, [CASE], SAMPLING, "cpu")
    assert rendered.nonfinite == 0
