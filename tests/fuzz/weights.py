"""Parsers of weights: safetensors files, LoRAs with all that speaks of their strength, bases with their JSON files."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from safetensors.numpy import save

import lora_fuse
from lora_fuse import LoraInput, Selection, cli
from lora_fuse.checkpoint.header import parse_header
from lora_fuse.checkpoint.shards import read_header
from lora_fuse.hub import lock_base
from lora_fuse.lora import open_lora
from lora_fuse.models import alpha_warnings
from lora_fuse.verification.weights import Weights
from tests.fuzz import formats
from tests.fuzz.parsers import Parser, these
from tests.support import key_styles, tiny

INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
SHARD = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
PEFT_CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 2,
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "target_modules": ["to_q"],
    "rank_pattern": {"attn.to_q": 4},
    "alpha_pattern": {r"blocks\.0\..*": 8},
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "lora_bias": False,
    "task_type": None,
    "peft_version": "0.21.0",
}
KOHYA = {
    "format": "pt",
    "ss_network_alpha": "4",
    "ss_network_dim": "4",
    "ss_network_args": '{"a": "4"}',
    "modelspec.title": "x",
}
HEADERS = (
    {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in PEFT_CONFIG.items()})},
    {"transformer.lora_alpha": "2", "transformer.r": "4", "algo": "lora", "software": "{}", "anything": "else"},
    {"alpha": "2", "rank": "4", "network_type": "LoRA", "config": json.dumps(PEFT_CONFIG)},
)


def small(tensors: dict[str, tiny.Array]) -> dict[str, tiny.Array]:
    """Only the first block's, so that most changes are of a kind that counts."""
    return {name: tensor for name, tensor in tensors.items() if "blocks.1" not in name and "blocks_1" not in name}


@cache
def base_shard() -> list[bytes]:
    return [save(small(tiny.weights()), metadata={"format": "pt"})]


@cache
def loras() -> list[bytes]:
    """LoRAs in all key styles and of all algorithms, some with headers that speak of alpha."""
    made = [save(small(key_styles.restyled(style, 2.0))) for style in key_styles.STYLES]
    for name in key_styles.ALGORITHMS:
        target, tensors, _ = key_styles.update_of(name)
        made.append(save({f"{target.rpartition('.')[0]}.{end}": tensor for end, tensor in tensors.items()}))
    made.append(save(small(tiny.lora_tensors(alpha=4.0)), metadata=KOHYA))
    made += [save(small(tiny.lora_tensors("diffusers", alpha=None)), metadata=header) for header in HEADERS]
    return made


def described(path: Path) -> None:
    """All that `inspect` shows of a LoRA."""
    lora = open_lora(path)
    alpha_warnings([(path.name, lora.missing_alphas)])
    for delta in lora.deltas:
        str((delta.description, delta.strength))
        lora.read(delta)


def in_file(parse: Callable[[Path], object], name: str = "x.safetensors") -> Callable[[Path, bytes], object]:
    """Write the content to a file of the folder, and parse that."""

    def written(folder: Path, content: bytes) -> object:
        (folder / name).write_bytes(content)
        return parse(folder / name)

    return written


def header(_: Path, content: bytes) -> None:
    end = 8 + int.from_bytes(content[:8], "little")
    parse_header(content[:end], len(content), "x")


def reopened(path: Path) -> None:
    """As the second derivation opens files."""
    weights = Weights([path])
    for name in weights.names():
        weights[name].same(weights[name], (0, weights[name].nbytes))


def pipeline(folder: Path) -> None:
    tiny.write_pipeline(folder / "base", small(tiny.weights()))
    tiny.write_lora(folder / "l.safetensors", small(tiny.lora_tensors()))


def planned(name: str) -> Callable[[Path, bytes], object]:
    """Plan a merge into a base of which one file is odd, and lock that base."""

    def parse(folder: Path, content: bytes) -> None:
        before = (folder / "base" / name).read_bytes()
        (folder / "base" / name).write_bytes(content)
        try:
            plan = lora_fuse.plan(folder / "base", [LoraInput("l", folder / "l.safetensors", 1.0)])
            cli._print_plan(plan)
            lock_base(tiny.in_folder(folder / "base"), previous=None)
        finally:
            (folder / "base" / name).write_bytes(before)

    return parse


def of_base(name: str) -> Callable[[], list[bytes]]:
    """The valid content of a file of a base."""

    def valid() -> list[bytes]:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            pipeline(Path(folder))
            return [(Path(folder) / "base" / name).read_bytes()]

    return valid


def peft_folder(folder: Path) -> None:
    pipeline(folder)
    tiny.write_lora(folder / "peft/adapter_model.safetensors", small(tiny.lora_tensors("peft", alpha=None)))


def peft(folder: Path, content: bytes) -> None:
    (folder / "peft/adapter_config.json").write_bytes(content)
    plan = lora_fuse.plan(folder / "base", [LoraInput("l", folder / "peft", 1.0)])
    cli._print_plan(plan)


def merged_folder(folder: Path) -> None:
    peft_folder(folder)
    (folder / "peft/adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    plan = lora_fuse.plan(folder / "base", [LoraInput("l", folder / "l.safetensors", 1.0)])
    lora_fuse.fuse(plan, folder / "out", device="cpu")


def verified(folder: Path, lora: Path) -> None:
    lora_fuse.verify(folder / "out", folder / "base", [LoraInput("l", lora, 1.0)], rows=1, seed=1)


def of_merged(name: str) -> Callable[[Path, bytes], object]:
    """Verify a merge of which one file is odd."""

    def parse(folder: Path, content: bytes) -> None:
        before = (folder / "out" / name).read_bytes()
        (folder / "out" / name).write_bytes(content)
        try:
            verified(folder, folder / "l.safetensors")
        finally:
            (folder / "out" / name).write_bytes(before)

    return parse


def read_twice(folder: Path, content: bytes) -> None:
    """A PEFT folder as the second derivation reads it, which shares nothing with the first."""
    (folder / "peft/adapter_config.json").write_bytes(content)
    verified(folder, folder / "peft")


def chosen(folder: Path, content: bytes) -> None:
    """Patterns of modules, a line each."""
    names = content.decode("utf-8", "surrogateescape").split("\n")
    selection = Selection(tuple(names[:2]), tuple(names[2:4]), dict.fromkeys(names[4:], 0.5))
    lora_fuse.plan(folder / "base", [LoraInput("l", folder / "l.safetensors", 1.0)], selection=selection)


def scheduler(folder: Path, content: bytes) -> None:
    (folder / "s.json").write_bytes(content)
    cli._scheduler(cli._parser().parse_args(["fuse", "b", "o", "--lora", "l", "--scheduler", str(folder / "s.json")]))


ARGUMENTS = (
    ["plan", "base", "--lora", "l.safetensors", "--scale", "0.5", "--only", "*.attn.*", "--module-scale", "*=0.5"],
    ["verify", "out", "base", "--lora", "l.safetensors", "--rows", "2", "--seed", "1", "--component", "transformer"],
    ["inspect", "l.safetensors"],
)


def commanded(_: Path, content: bytes) -> None:
    """A command line, a list of words; the folder is the current one."""
    words = json.loads(content)
    given = [str(word).replace("\0", "") for word in words] if isinstance(words, list) else []
    if "fuse" not in given:  # it writes
        with suppress(SystemExit):
            cli._run(cli._parser().parse_args(given))


def rows() -> Iterator[Parser]:
    yield Parser("safetensors header", header, formats.SAFETENSORS, base_shard)
    yield Parser("safetensors file", in_file(read_header), formats.SAFETENSORS, base_shard)
    yield Parser("safetensors file, verified", in_file(reopened), formats.SAFETENSORS, base_shard)
    yield Parser("LoRA", in_file(described), formats.SAFETENSORS, loras, examples=25)
    yield Parser(
        "adapter_config.json", peft, formats.JSON, lambda: [json.dumps(PEFT_CONFIG).encode()], peft_folder, examples=20
    )
    yield Parser(
        "adapter_config.json, verified",
        read_twice,
        formats.JSON,
        lambda: [json.dumps(PEFT_CONFIG).encode()],
        merged_folder,
    )
    for name in (SHARD, INDEX, "model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        kind = formats.SAFETENSORS if name == SHARD else formats.JSON
        yield Parser(f"base, {Path(name).name}", planned(name), kind, of_base(name), pipeline)
        yield Parser(
            f"merge, {Path(name).name}",
            of_merged(name),
            kind,
            of_base(name),
            merged_folder,
        )
    patterns = [b"*.attn.*\n*\n*.img_mlp.*\n*.net.*\n*.to_[qk]"]
    yield Parser("patterns", chosen, formats.raw, lambda: patterns, pipeline)
    yield Parser(
        "scheduler of a file", scheduler, formats.JSON, lambda: [b'{"_class_name": "E", "shift": 1.0, "use": true}']
    )
    lines = these(*(json.dumps(words).encode() for words in ARGUMENTS))
    yield Parser("command line", commanded, formats.JSON, lines, merged_folder, (OSError, ValueError, RecursionError))
