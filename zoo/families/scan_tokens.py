"""Family base of methods that shorten the sequence inside a state-space vision encoder."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from zoo.engines.scan_tokens import ScanReducer, Select
from zoo.errors import Refused
from zoo.families.encoder_tokens import AppliedEncoder
from zoo.interface import Method, refuse
from zoo.models import LoadedModel
from zoo.models.anatomy import StateSpaceEncoder


class ScanTokenReducer(Method):
    """A method that chooses tokens behind some blocks; see ``zoo.engines.scan_tokens``."""

    phase = "encoder-tokens"

    @abstractmethod
    def stages(self, encoder: StateSpaceEncoder) -> dict[int, Select]:
        """Blocks, counted from 0, behind which tokens leave, and who chooses. Empty leaves the model as it is."""

    def facts(self, reducer: Any) -> dict[str, float | int | str]:
        """Figures of the latest input for the report: the paper's own budget, the variant that ran."""
        return {}

    def check(self, loaded: LoadedModel) -> None:
        """Refuse models that are no state-space encoder, and those that lack a block."""
        encoder = loaded.anatomy.state_space
        if encoder is None:
            raise refuse(
                self,
                "a vision state-space model such as Vim",
                f"the architecture {loaded.anatomy.description}",
            )
        depth, stages = len(encoder.blocks), self.stages(encoder)
        if any(block >= depth for block in stages):
            raise Refused(
                f"{self.slug} reduces behind block {max(stages) + 1}, but this model has only {depth} blocks: "
                f"choose blocks between 1 and {depth}"
            )

    def apply(self, loaded: LoadedModel, **resources: Any) -> AppliedEncoder:
        """Hook ``loaded``; every input that follows is shortened until ``close``.

        Raises:
            Refused: the model lacks what the method needs.
        """
        self.check(loaded)
        encoder = loaded.anatomy.state_space
        assert encoder is not None
        return AppliedEncoder(self, loaded, self.reducer(encoder))

    def reducer(self, encoder: StateSpaceEncoder) -> ScanReducer:
        """The engine with this method's stages."""
        return ScanReducer(encoder, self.stages(encoder), self.slug)
