"""What EigenTrack says of requests, on its way from the worker to the user."""

from dataclasses import dataclass, field
from typing import Any

KEY = "eigentrack"  # in additional_config, and of the engine output that carries a report


@dataclass
class Report:
    """One engine step's results, as plain values: they may cross processes.

    Attributes:
        slots, slots_in_use: windows that there are, and that belong to a request.
        told: for each request that has news, arguments of `Readings.add`.
    """

    slots: int
    slots_in_use: int
    told: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Readings:
    """What EigenTrack saw of one completion: `completion.eigentrack`. It grows while the completion is generated.

    Attributes:
        risk: after each token of the answer that was fed (all but the last); None where there is none.
        descriptors: of the same tokens, if the configuration asks for them; None where the row was not finite.
        lost: whether watching ended before the completion did (docs/vllm.md).
        stopped: whether the stop rule ended it.
    """

    risk: list[float | None] = field(default_factory=list)
    descriptors: list[list[float] | None] = field(default_factory=list)
    lost: bool = False
    stopped: bool = False

    def add(
        self,
        risk: list[float | None] | None = None,
        descriptors: list[list[float] | None] | None = None,
        lost: bool = False,
        stopped: bool = False,
    ) -> None:
        """Takes what a report tells."""
        self.risk += risk or []
        self.descriptors += descriptors or []
        self.lost |= lost
        self.stopped |= stopped

    @property
    def highest(self) -> float | None:
        """The highest risk so far."""
        return max((risk for risk in self.risk if risk is not None), default=None)
