"""The fields of a PEFT configuration: the values that leave a merge what the tensors say, and why others do not.

Source: `LoraConfig` and `PeftConfig` of PEFT 0.21.2 (peft/tuners/lora/config.py, peft/config.py); a test compares the
names with those classes. A field that is not here, of a newer PEFT, is accepted at its default alone, which is null,
false or empty there as everywhere else. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lora_fuse.errors import BadLora

UNSET: tuple[object, ...] = (None, False, 0, "", [], {})
DEFAULT_ALPHA = 8.0  # of PEFT's LoraConfig, where a configuration does not say `lora_alpha`


@dataclass(frozen=True, slots=True)
class Field:
    """A field: the values accepted beside an unset one, None for any; of others, the reason and the way out."""

    accepted: Collection[object] | None = None
    reason: str = ""


_ANY = Field()
_BASE = (
    "it changes the base's weights before the training; save the adapter with path_initial_model_for_weight_conversion"
)
_INSTEAD = "bake it with PEFT's merge_and_unload"


def _unset(reason: str) -> Field:
    return Field((), f"{reason}; {_INSTEAD}")


FIELDS: Mapping[str, Field] = {
    # read in `scaling`: rank, alpha and kind
    **dict.fromkeys(("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias"), _ANY),
    "peft_type": Field(("LORA",), f"only LORA, with or without DoRA, is known; {_INSTEAD}"),
    # the choice of modules, which the tensors' names say, and the training
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"), _ANY),
    **dict.fromkeys(("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"), _ANY),
    **dict.fromkeys(("inference_mode", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size"), _ANY),
    "eva_config": _ANY,  # an initialisation of A from activations: layer.py leaves the base as it is
    "velora_config": _ANY,  # another backward pass alone: variants.py, VeloraLinearVariant
    "init_lora_weights": Field((True, "true", "gaussian", "eva", "orthogonal", "mica"), _BASE),
    "loftq_config": Field((), _BASE),
    "corda_config": Field((), _BASE),
    "lora_ga_config": Field((), _BASE),
    "kasa_config": _unset("it takes singular components out of the base and puts a diagonal between the factors"),
    "fan_in_fan_out": _unset("its weights lie transposed in the base"),
    "bias": Field(("none",), f"biases of the base were trained, too; {_INSTEAD}"),
    "modules_to_save": _unset("whole modules are stored beside the factors"),
    "target_parameters": _unset("its factors are for parameters that are no module's weight"),
    "trainable_token_indices": _unset("rows of an embedding are stored beside the factors"),
    "layer_replication": _unset("its model has layers of the base more than once"),
    "ensure_weight_tying": _unset("one difference is for several modules"),
    "alora_invocation_tokens": _unset("it works behind certain tokens alone, and a merge everywhere"),
    "use_qalora": _unset("its inputs are pooled in groups"),
    "use_bdlora": _unset("its factors are block-diagonal"),
    "arrow_config": _unset("it chooses between adapters at each token"),
    "monteclora_config": _unset("its factors are drawn at random"),
    "megatron_config": _unset("its layers are Megatron's, split over devices"),
}  # fmt: skip


def check_fields(entries: Mapping[str, Any], where: str) -> None:
    """Refuse a value that would make the merge another than factors and alpha say.

    Raises:
        BadLora: there is one; the message names the place, the field and its value.
    """
    for name, value in entries.items():
        known = FIELDS.get(name)
        if any(value is unset or (value == unset and type(value) is type(unset)) for unset in UNSET):
            continue
        if known is None:
            raise BadLora(f"{where} sets {name}={value!r}, which is not known here; {_INSTEAD}")
        if known.accepted is not None and value not in known.accepted:
            raise BadLora(f"{where} sets {name}={value!r}, which cannot be merged here: {known.reason}")
