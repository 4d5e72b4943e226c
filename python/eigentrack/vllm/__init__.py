"""EigenTrack inside vLLM (docs/vllm.md): every running request is scored while it is generated.

`completion.eigentrack` holds the `Readings` of a completion; `RiskInResponses` puts them into the server's responses.
"""

from eigentrack.vllm.report import Readings
from eigentrack.vllm.server import RiskInResponses

__all__ = ["Readings", "RiskInResponses"]
