"""Hooks on a vLLM model's blocks."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from eigentrack.errors import TapError
from eigentrack.taps import find_blocks
from eigentrack.vllm.state import State


def parts_of(output: Any, width: int) -> tuple[Tensor, ...]:
    """The (T, D) tensors in a block's output whose sum is the residual stream: one, or hidden state and residual.

    vLLM's blocks leave the addition to the next block's fused norm.

    Raises:
        TapError: if the output is neither.
    """
    parts = output if isinstance(output, tuple) else (output,)
    wanted = len(parts) in (1, 2) and all(isinstance(part, Tensor) and part.dim() == 2 for part in parts)
    if not wanted or any(part.shape != parts[0].shape or part.shape[1] != width for part in parts):
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        raise TapError(
            f"a watched block must return a (T, {width}) tensor, or two whose sum is the residual stream, got {shapes}"
        )
    return parts


class Taps:
    """Hands the outputs of the watched blocks to the state while `listening`, and notes how many came.

    `listening` is true from the beginning of a pass to its end, unless `before` says otherwise.

    Raises:
        TapError: if the model's blocks are not found.
    """

    def __init__(self, model: nn.Module, depth: int, layers: Sequence[int], state: State, width: int) -> None:
        self.listening = False
        self.collected = 0
        self._before: Callable[[], None] | None = None
        self._after: Callable[[], None] | None = None
        blocks = find_blocks(model)
        if len(blocks) != depth:
            raise TapError(f"{type(model).__name__} has {len(blocks)} blocks where its config has {depth} layers")
        model.register_forward_pre_hook(lambda module, args: self._begin())
        for position, layer in enumerate(layers):
            blocks[layer].register_forward_hook(self._collector(position, state, width))
        model.register_forward_hook(lambda module, args, output: self._end())

    def listen(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """In the next pass, calls `before` when it begins, collects, and calls `after` at its end (logits follow)."""
        self._before, self._after, self.collected = before, after, 0

    def _begin(self) -> None:
        self.listening = self._before is not None
        if self._before is not None:
            self._before()
            self._before = None

    def _end(self) -> None:
        if self.listening and self._after is not None:
            self.listening = False
            self._after()

    def _collector(self, position: int, state: State, width: int) -> Callable[[nn.Module, Any, Any], None]:
        def collect(module: nn.Module, args: Any, output: Any) -> None:
            if self.listening:
                state.collect(position, parts_of(output, width))
                self.collected += 1

        return collect
