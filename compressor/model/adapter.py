"""Who explains a model's structure: adapters that plugins offer, and for all other models what is found by itself.

    class SpecialistsAdapter(Adapter):
        name = "specialists"

        def explains(self, config):
            return config.model_type == "specialists"

        def structure(self, factory, config):
            return find_structure(factory, config, count=ConfigLeaf((), "num_specialists"))

An adapter answers with a `Structure`: it may say which integer counts the experts and let the rest be found, or mend
what was found with `dataclasses.replace`. Everything else (masking, watching, removing, saving) works from that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from compressor.errors import UnsupportedModelError
from compressor.model.find_structure import ModelFactory, find_structure
from compressor.model.structure import Structure
from compressor.model.uneven import as_stored


class Adapter(ABC):
    """Explains the structure of one family of models. Subclass it and offer an instance through the hook."""

    name: ClassVar[str]
    """Stands in messages."""

    @abstractmethod
    def explains(self, config: Any) -> bool:
        """Whether this adapter speaks for models of this config. Reads the config only."""

    @abstractmethod
    def structure(self, factory: ModelFactory, config: Any) -> Structure:
        """The structure that `factory(config)` has; config unchanged, no weights. UnsupportedModelError if unknown."""


def structure_of(
    factory: ModelFactory, config: Any, adapters: Sequence[Adapter] = (), *, plain: bool = False
) -> Structure:
    """The structure, by the adapter that explains this config or found by itself; with what the config says beyond its
    class unless `plain`. Raises UnsupportedModelError, also where two adapters claim the config.
    """
    claiming = [adapter for adapter in adapters if adapter.explains(config)]
    if len(claiming) > 1:
        names = " and ".join(adapter.name for adapter in claiming)
        raise UnsupportedModelError(
            f"{config.model_type}: several adapters explain it: {names}. Run with --without one of their plugins."
        )
    structure = claiming[0].structure(factory, config) if claiming else find_structure(factory, config)
    return structure if plain else as_stored(structure, config)
