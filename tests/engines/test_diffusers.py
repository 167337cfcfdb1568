"""diffusers draws from the exports, loaded as the card says, as from the merged folder."""

import runpy
from typing import Any

import pytest

from lora_fuse.exports.readers import readers_of
from tests.engines import denoiser
from tests.engines.conftest import Answers, Exported, noted
from tests.engines.denoiser import Case

Loaded = tuple[str, Any]

pytestmark = pytest.mark.engines

# Relative L2 to the merged checkpoint in float32, twice what was measured; and to the weights as they are decoded here.
# diffusers multiplies a GGUF's codes and scales in float16, whatever it computes in.
BOUNDS = {
    "single_file": (0.0, 0.0),
    "fp8_rows": (2e-2, 1e-6),
    "gguf_q8_0": (4e-3, 2e-4),
    "gguf_q4_k": (5e-2, 6e-4),
}


@pytest.fixture(scope="module", params=BOUNDS)
def loaded(request: pytest.FixtureRequest, exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A format and diffusers' model of it, by the card's own code, but in float32."""
    name = request.param
    (reader,) = [one for one in readers_of(name) if one.name == "diffusers"]
    code = reader.loading(str(exported.file(name)), str(exported.project.merged), "QwenImageTransformer2DModel")
    script = tmp_path_factory.mktemp(name) / "load.py"
    script.write_text(code.replace("bfloat16", "float32"))
    return name, runpy.run_path(str(script))["transformer"].eval()


def test_an_export_is_drawn_as_the_merged_folder(loaded: Loaded, reference: Answers, case: Case) -> None:
    name, model = loaded
    answer = denoiser.by_diffusers(model, case)
    assert noted("diffusers 0.42.1", name, case, answer, reference[case, False], "merged") <= BOUNDS[name][0]


def test_an_export_is_read_as_it_is_decoded_here(loaded: Loaded, exported: Exported, case: Case) -> None:
    name, model = loaded
    answer = denoiser.by_diffusers(model, case)
    decoded = exported.decoded(name)[case, False]
    assert noted("diffusers 0.42.1", name, case, answer, decoded, "decoded by us") <= BOUNDS[name][1]
