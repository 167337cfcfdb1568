"""Candidates as a run leaves them, made by hand, for tests of goldens and of approval."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np

from lora_fuse.pictures import encode
from lora_fuse.pictures.environment import FLAGS, Environment, Key
from lora_fuse.pictures.picture import Levels
from lora_fuse.recipe.records import MergedLora, Tool
from lora_fuse.regression.candidates import Candidate, CaseRecord, PictureInputs, Provenance
from lora_fuse.regression.goldens import Approval
from lora_fuse.regression.run_record import RunRecord, digest_of

KEY = Key("cpu", "x86_64-avx2", 2, "float32", "2.13", "0.42")
LORA = MergedLora("lightning", 1.0, "a" * 64, "l.safetensors", "owner/lora", None, "b" * 40)
ENVIRONMENT = Environment(
    KEY, "x86_64", None, None, "2.13.0+cpu", "0.42.0", "5.17.0", "3.12", "cpu", {**FLAGS, "MKL_CBWR": "COMPATIBLE"}
)
PICTURE_INPUTS = PictureInputs(
    recipe="pocket",
    base="owner/base@0123",
    base_sha256="c" * 64,
    loras=(LORA,),
    manifest_sha256="d" * 64,
    pipeline="QwenImageEditPipeline",
    case=CaseRecord("rabbit", "make it purple", 0, {"pocket/inputs/rabbit.png": "e" * 64}, 128, None),
    steps=4,
    true_cfg_scale=1.0,
    negative_prompt=" ",
    scheduler={"shift": 1.0, "shift_terminal": None, "time_shift_type": "exponential", "use_dynamic_shifting": True},
    sigmas=(1.0, 0.8999999761581421, 0.75, 0.5, 0.0),
)
TOOL = Tool("0.1.0", "f" * 40, dirty=False)
PROVENANCE = Provenance.of(PICTURE_INPUTS, RunRecord(1, "m", ENVIRONMENT, TOOL, "2026-11-25T11:00:00+00:00", {}))
APPROVAL = Approval("A Person <a@example.org>", "2026-11-25T12:00:00+00:00", "it is purple", ())


def run_record(key: Key = KEY, candidates: str = "", tool: Tool = TOOL) -> RunRecord:
    return RunRecord(1, digest_of(candidates), replace(ENVIRONMENT, key=key), tool, "2026-11-25T11:00:00+00:00", {})


def picture(seed: int = 0) -> Levels:
    return np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def candidate(png: bytes, name: str = "rabbit", *, agrees: bool = True, **changes: Any) -> Candidate:
    """What a run says of a picture; `changes` are of its provenance."""
    provenance = replace(PICTURE_INPUTS, **{"case": replace(PROVENANCE.case, name=name), **changes})
    reasons = () if agrees else ("PSNR to the unfused picture of this run is 20.00 dB, below 60 dB.",)
    return Candidate(
        hashlib.sha256(png).hexdigest(), agrees, reasons, {"latents_l2": 1e-4, "psnr_db": 65.0}, provenance
    )


def weight_check(manifest_sha256: str = "m", **changes: Any) -> dict[str, Any]:
    """The content of a `verify.json`."""
    passed = {"passed": True, "manifest_sha256": manifest_sha256, "targets": 1, "rows_checked": 4, "rows_total": 4}
    return {**passed, "problem_count": 0, "problems": [], "changes": {}, **changes}


def png(seed: int = 0) -> bytes:
    return encode.png(picture(seed))
