"""What a vLLM model's blocks return."""

from collections.abc import Callable, Sequence
from functools import wraps
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
    """Hands the outputs of the watched blocks to the state, in the passes that are announced.

    Their `forward` is wrapped: with hooks, `nn.Module.__call__` takes a longer way, which is slow where the model's
    weights have just gone through the caches.

    Args:
        layers: of the blocks, ascending.

    Raises:
        TapError: if the model's blocks are not found.
    """

    def __init__(self, model: nn.Module, depth: int, layers: Sequence[int], state: State, width: int) -> None:
        self.collected = 0  # blocks, in the last pass that was announced
        self._last, self._collect, self._width = len(layers) - 1, state.collect, width
        self._listening = False
        self._before: Callable[[], bool] | None = None
        self._after: Callable[[], None] | None = None
        blocks = find_blocks(model)
        if len(blocks) != depth:
            raise TapError(f"{type(model).__name__} has {len(blocks)} blocks where its config has {depth} layers")
        for position, layer in enumerate(layers):
            blocks[layer].forward = self._tapped(blocks[layer].forward, position)

    def listen(self, before: Callable[[], bool], after: Callable[[], None]) -> None:
        """In the next pass: asks `before`, when the first watched block has run, whether there is anything to collect;
        if so, collects, and calls `after` behind the last one."""
        self._before, self._after = before, after
        self._listening, self.collected = False, 0

    @property
    def through(self) -> bool:
        """Whether the announced pass has brought all that it was to bring."""
        return self._before is None and not self._listening

    def _tapped(self, forward: Callable[..., Any], position: int) -> Callable[..., Any]:
        checked = False

        @wraps(forward)
        def tapped(*args: Any, **named: Any) -> Any:
            nonlocal checked
            output = forward(*args, **named)
            if position == 0:
                self._listening = self._before is not None and self._before()
                self._before = None
            if self._listening:
                if not checked:
                    parts_of(output, self._width)
                    checked = True
                self._collect(position, output if isinstance(output, tuple) else (output,))
                self.collected += 1
                if position == self._last:
                    self._end()
            return output

        return tapped

    def _end(self) -> None:
        self._listening = False
        if self._after is not None:
            self._after()
