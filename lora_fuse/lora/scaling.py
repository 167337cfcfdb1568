"""The strength of a module: what the places say that state alpha and rank, and one answer of them all. Pure.

Places are a tensor `X.alpha`, entries of the file's header and PEFT's configuration. One that speaks is enough; two
that disagree are refused. docs/fuse.md has them in a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_fuse.errors import BadLora, FactorMismatch
from lora_fuse.lora.key_formats import PREFIXES, component_of, spellings
from lora_fuse.lora.name_patterns import NamePatterns

CLOSE = 2.0**-8  # relative; alphas are stored in dtypes down to bfloat16, which rounds by half as much
NOWHERE = "nowhere: alpha = rank"


@dataclass(frozen=True, slots=True)
class StatedScale:
    """The rank and alpha of modules as one place outside the tensors states them; None is not said there.

    With `rank_stabilized` the factor is alpha / sqrt(rank). `component` is the beginning of the names that it is for,
    ``unet`` for one, and `only_rank` the rank of those: a trainer's default says nothing of a module that was given
    another. `default_alpha` counts where no place says one. Patterns are for the names of a file, and for those without
    their prefixes, as PEFT's begin inside the model. `dora` and `bias` say whether there are such tensors.
    """

    where: str
    rank: int | None = None
    alpha: float | None = None
    default_alpha: float | None = None
    rank_stabilized: bool = False
    rank_pattern: NamePatterns[int] = field(default_factory=NamePatterns)
    alpha_pattern: NamePatterns[float] = field(default_factory=NamePatterns)
    component: str = ""
    only_rank: int | None = None
    dora: bool | None = None
    bias: bool | None = None
    has_expressions: bool = False  # of its patterns, also those that choose modules

    def rank_of(self, module: str) -> int | None:
        """The rank that this place gives a module."""
        return self.rank_pattern.find(spellings(module, PREFIXES), self.rank)

    def alpha_of(self, module: str) -> float | None:
        """The alpha that this place gives a module."""
        return self.alpha_pattern.find(spellings(module, PREFIXES), self.alpha)

    def factor(self, alpha: float, rank: int) -> float:
        """The factor of a low-rank product: alpha / rank, or alpha / sqrt(rank) with `use_rslora`.

        Sources: Hu et al. 2021, arXiv:2106.09685, section 4.1; Kalajdzievski 2023, arXiv:2312.03732.
        """
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank


@dataclass(frozen=True, slots=True)
class ModuleScale:
    """The strength of one module and the place that says it."""

    alpha: float
    factor: float
    where: str


def scale_of(module: str, rank: int, own: float | None, stated: Sequence[StatedScale], where: str) -> ModuleScale:
    """The strength of a module with factors of a rank; `own` is the value of its ``.alpha`` tensor.

    Raises:
        BadLora: an alpha is not finite, or two places say different things.
        FactorMismatch: a place says another rank than the factors have.
    """
    said = [] if own is None else [ModuleScale(own, own / rank, ".alpha")]
    places = _for_module(stated, module, where)
    for place in places:
        told = place.rank_of(module)
        if told is not None and told != rank:
            raise FactorMismatch(
                f"{where}: the factors of {module!r} have rank {rank}, and {place.where} says {told}; "
                "it belongs to another file"
            )
        alpha = place.alpha_of(module)
        if alpha is not None and place.only_rank in (None, rank):
            said.append(ModuleScale(alpha, place.factor(alpha, rank), place.where))
    said = said or [
        ModuleScale(place.default_alpha, place.factor(place.default_alpha, rank), f"the default of {place.where}")
        for place in places
        if place.default_alpha is not None
    ]
    for scale in said:
        if not math.isfinite(scale.alpha):
            raise BadLora(f"{where}: the alpha of {module!r} is {scale.alpha}, not a finite number; the file is broken")
        if not math.isclose(scale.factor, said[0].factor, rel_tol=CLOSE):
            raise BadLora(
                f"{where}: {said[0].where} gives {module!r} alpha {said[0].alpha:g} (factor {said[0].factor:g}), and "
                f"{scale.where} alpha {scale.alpha:g} (factor {scale.factor:g}); take out the one that is wrong"
            )
    return said[0] if said else ModuleScale(float(rank), 1.0, NOWHERE)


def _for_module(stated: Sequence[StatedScale], module: str, where: str) -> list[StatedScale]:
    """The statements that are about a module: of several components those of its own, or else of the main one."""
    general = [place for place in stated if not place.component]
    special = [place for place in stated if place.component]
    own = [place for place in special if module.startswith(f"{place.component}.")]
    own = own or [place for place in special if _denoises(place.component)] or special
    if len({place.component for place in own}) > 1:
        raise BadLora(
            f"{where}: the header speaks of {' and '.join(sorted(place.where for place in own))}, and the name of "
            f"{module!r} does not say which of them is meant; put the component before the names"
        )
    return general + own


def _denoises(component: str) -> bool:
    """True for a component that a module may be of whose name says none: a file may be for the second transformer."""
    return component_of(f"{component}.") in (None, "transformer_2")
