"""One folder of a base: which of its weights are chosen, which of its files are taken over, and why the others are not.

Pure: names and parsed JSON in, names out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from lora_fuse.checkpoint.file_roles import Role, role_of
from lora_fuse.checkpoint.weight_sets import FileListing, WeightSet, choose_weights

WHOLE = "weights beside the components, which are not fused"
OTHER_WEIGHTS = "other weights of the component to fuse, which would stay unfused"
VARIANT = "other weights of a component, of which those that load without `variant` are taken"
FOR_PREFERRED = "other weights of a component, of which the variant is taken that the fused component has"
CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, slots=True)
class ComponentFolder:
    """A folder of a base, ``""`` for the top.

    Attributes:
        path: its POSIX path.
        names: the files in it.
        fused: the components to fuse, the main one first; ``""`` where the base is that component.
        asked: the module and class that `model_index.json` names for it, for the top those of the pipeline; None
            without.
        listing: all of the base.
    """

    path: str
    names: Sequence[str]
    fused: tuple[str, ...]
    asked: tuple[str, str] | None
    listing: FileListing

    @property
    def weights(self) -> list[str]:
        """Its safetensors files and their indexes."""
        return self._of(Role.WEIGHTS, Role.INDEX)

    @property
    def is_fused(self) -> bool:
        """True for a component to fuse and for what is below it."""
        return any(not one or f"{self.path}/".startswith(f"{one}/") for one in self.fused)

    def choose(self, fused: WeightSet | None) -> WeightSet | None:
        """The weights that are taken; `fused` are those of the main component to fuse, where they are chosen already.

        Raises:
            listing.fail: see `choose_weights`.
        """
        if self.path == self.fused[0]:
            return fused or choose_weights(self.listing, self.path, self.weights, None)
        if not self.path or (self.is_fused and self.path not in self.fused):
            return None
        return choose_weights(self.listing, self.path, self.weights, fused.variant if fused else None)

    def verdicts(self, chosen: WeightSet | None, variant: str | None) -> dict[str, str | None]:
        """For each file the reason why it stays behind; None for those that are taken.

        `chosen` are the folder's weights, `variant` is that of the component to fuse.
        """
        weights = self.weights
        kept = set() if chosen is None else {*chosen.files, chosen.index}
        other = OTHER_WEIGHTS if self.is_fused else WHOLE if not self.path else VARIANT
        if other == VARIANT and variant is not None:
            other = FOR_PREFERRED
        taken = {Role.TEXT}
        if self._asks_for_code():
            taken.add(Role.CODE)
        if self.path and self.asked is not None and not weights:
            taken.add(Role.FOREIGN)  # for who loads them, as diffusers does with ONNX; there are no others
        reasons: dict[str, str | None] = {}
        for name in self.names:
            row = role_of(name)
            if name in weights:
                reasons[name] = None if name in kept else other
            else:
                reasons[name] = None if row.role in taken else row.reason
        return reasons

    def refuse_only_pickles(self, chosen: WeightSet | None, variant: str | None) -> None:
        """Refuse a component that a library would load from a pickle: without it the result would not load.

        `chosen` are its weights, `variant` is what the component to fuse has to be loaded with.

        Raises:
            listing.fail: it has no others, or as safetensors only a variant that nobody asks for.
        """
        pickles = self._of(Role.PICKLE)
        is_model = any(PurePosixPath(name).name == "config.json" for name in self.names)
        if chosen is not None:
            plain = [name for name in pickles if PurePosixPath(name).name.count(".") == 1]
            pickles = plain if chosen.variant not in (None, variant) else []
        if pickles and is_model:
            loader = ".".join(self.asked) if self.asked else "CLASS"
            raise self.listing.fail(
                f"{self.listing.place(self.path)} has weights only as pickles ({pickles[0]}), which can run code and "
                f"are never taken; write them as safetensors: {loader}.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )

    def without_weights(self, others: Iterable[ComponentFolder]) -> str:
        """A sentence on the component to fuse, which has no safetensors; `others` are all folders."""
        label = self.listing.label
        if foreign := self._of(Role.FOREIGN):
            itself = "name that file itself as the base, or " if foreign[0].lower().endswith(".gguf") else ""
            return (
                f"{self.listing.place(self.path)} has its weights as {PurePosixPath(foreign[0]).name} only; {itself}"
                "take the same model as safetensors"
            )
        if not self.path:
            return f"{label} has no safetensors weights; give a folder or a file that has some"
        there = [folder.path for folder in others if folder.path and "/" not in folder.path and folder.weights]
        lacks = f"no safetensors weights in {self.path}/" if self.names else f"no component {self.path}"
        if not there:
            return f"{label} has {lacks}, nor in any other component; get a complete copy"
        return (
            f"{label} has {lacks}; it has weights in {', '.join(there)}: name the one that the LoRA is for, "
            f"--component {there[0]}"
        )

    def _of(self, *roles: Role) -> list[str]:
        return [name for name in self.names if role_of(name).role in roles]

    def _asks_for_code(self) -> bool:
        """True where a class of the base is defined in the Python files of this folder.

        So say a `module.py` of the module that `model_index.json` names for the component, or for the pipeline itself
        (diffusers, `_get_custom_components_and_folders`), and `auto_map` in a configuration (transformers).
        """
        code = {PurePosixPath(name).stem for name in self._of(Role.CODE)}
        if code and self.asked is not None and self.asked[0] in code:
            return True
        configs = [name for name in self.names if code and PurePosixPath(name).name in CONFIGS]
        return any(isinstance(found := self.listing.read(name), dict) and found.get("auto_map") for name in configs)
