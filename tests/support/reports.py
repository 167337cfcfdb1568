"""Reports of made-up cases, and the tags of a page."""

import dataclasses
from collections.abc import Sequence
from html.parser import HTMLParser

import numpy as np

from lora_fuse.pictures import encode
from lora_fuse.pictures.cases import Case, Sampling
from lora_fuse.pictures.encode import Encoded
from lora_fuse.pictures.metrics import heat_map
from lora_fuse.pictures.pairs import Setup
from lora_fuse.pictures.picture import Latents, Levels, Picture
from lora_fuse.recipe.records import Lock, Manifest, MergedLora
from lora_fuse.regression.case_judgement import examine
from lora_fuse.regression.report import BlockChange, CaseReport, Report
from lora_fuse.regression.review import flat_metrics
from lora_fuse.regression.verdicts import CaseResult, Golden, Limits, Rules, worst

LIMITS = Limits({"psnr_db": 40, "max_abs": 8})
RULES = Rules(LIMITS, LIMITS)
SHA = "ab" * 32
LORA = MergedLora("lightning", 0.5, SHA, "l.safetensors", "owner/lora", None, "4567")
MANIFEST = Manifest(1, "pocket", Lock("owner/base", None, None, "0123", {}), (LORA,), 1.0, 1, {})
SETUP = Setup("QwenImageEditPipeline", Sampling(4, 1.0, " "), {"base_shift": 1.1}, "cpu", "float32")
HOSTILE = '<script>alert(1)</script> & "quoted" \' <img src=x onerror=alert(1)>'


def scene(seed: int = 0, height: int = 16, width: int = 24) -> Levels:
    return np.random.default_rng(seed).integers(60, 190, (height, width, 3), dtype=np.uint8)


def latents(noise: float) -> Latents:
    return (1 + noise * np.random.default_rng(0).standard_normal(256)).astype(np.float32)


def encoded(picture: Levels) -> Encoded:
    return Encoded(encode.png(picture))


def judged(
    name: str,
    merged: Levels,
    golden: Levels | None,
    prompt: str = "make it purple",
    *,
    elsewhere: str | None = None,
    changed: Sequence[str] = (),
    over: float = 1.0,
    rules: Rules = RULES,
) -> CaseReport:
    """A case whose sides are the same picture, and their latents that many times the floor apart."""
    goldens = () if golden is None else (Golden(golden, name=f"{name}.png", elsewhere=elsewhere),)
    sides = [Picture(merged, latents=latents(noise)) for noise in (0.001 * over, 0.0, 0.001)]
    result = examine(Case(name, prompt, seed=7), sides[0], sides[1], goldens, rules, sides[2])
    others = {"golden": golden, "unfused": merged}
    same = {name: other for name, other in others.items() if other is not None and other.shape == merged.shape}
    return CaseReport(
        result,
        (encoded(scene(9)),),
        encoded(merged),
        encoded(merged),
        None if golden is None else encoded(golden),
        {name: encode.encoded_map(heat_map(merged, other)) for name, other in same.items()},
        "0.42 s, 9.50 steps/s",
        None if golden is None else tuple(changed),
    )


def page_of(*cases: CaseReport) -> Report:
    return Report(
        recipe="pocket",
        verdict=worst(case.result.verdict for case in cases),
        next_step="dvc repro what-is-next",
        manifest=MANIFEST,
        setup=SETUP,
        sigmas=(1.0, 0.9, 0.75, 0.5, 0.0),
        verify={
            "passed": True,
            "targets": 840,
            "rows_checked": 13440,
            "rows_total": 5_000_000,
            "problems": [],
            "changes": {"w": {"relative_norm": 0.02, "cosine": 0.99, "noise": 0.01}},
        },
        blocks=(BlockChange("0", 0.02), BlockChange("1", 0.04)),
        environment={"device": "cpu", "torch": "2.13.0+cpu"},
        warnings=("the LoRA was made for another base",),
        rules=RULES,
        cases=cases,
    )


EXACT = judged("good", scene(), scene())
NO_GOLDEN = judged("fresh", scene(), None)
REGRESSION = judged("bad", scene(1), scene())
REVIEW = judged("near", scene(), scene(), elsewhere="cpu-arm64 (isa there)", changed=("torch is 2.13, was 2.12",))
RESIZED = judged("larger", scene(), scene(0, 32, 48))
APART = judged("apart", scene(), scene(), over=3, rules=dataclasses.replace(RULES, over_floor=2.0))


class Tags(HTMLParser):
    """Collects every tag with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br", "input"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def metrics_of(*cases: CaseReport) -> dict[str, object]:
    results: list[CaseResult] = [case.result for case in cases]
    return {**flat_metrics(results), "recipe": "pocket"}
