"""Spectra in the logs of a transformers Trainer. Imports transformers: to be imported when it is asked for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from eigentrack.errors import EigenTrackError
from eigentrack.options import FEW, check_window, descriptor_columns
from eigentrack.taps import find_blocks, hidden_state, select_layers
from rmtkernels import spectrum_descriptors


class SpectraCallback(TrainerCallback):
    """Logs descriptors of the hidden states of chosen layers while a Trainer trains, to whatever it reports to.

    `trainer.add_callback(SpectraCallback(trainer))`. Every `every` steps `window` hidden states, evenly spaced over the
    tokens of the step's first batch on this process (padding left out), give one spectrum per layer: what is logged is
    "spectra/layer2.entropy", ..., made as EigenTrack makes them by default. Nothing is computed at other steps, and
    training is not changed by a bit. With fewer tokens than the window there are fewer eigenvalues; with fewer than
    two, nothing is logged.

    Args:
        trainer: that logs.
        layers: as of EigenTrack: "every:k" (default "every:3"), "all", or indices of blocks.
        descriptors: which of `rmtkernels.DESCRIPTORS`.
        window: N, how many hidden states, 1 to 128.
        every: steps from one spectrum to the next; None for the Trainer's own logging_steps.

    Raises:
        EigenTrackError: if an option is impossible, or at the beginning of training, if the Trainer compiles the model.
        TapError: if the model has no such layers.
    """

    def __init__(
        self,
        trainer: Trainer,
        layers: str | Sequence[int] = "every:3",
        *,
        descriptors: Sequence[str] = FEW,
        window: int = 128,
        every: int | None = None,
    ) -> None:
        check_window(window)
        if every is not None and (type(every) is not int or every < 1):
            raise EigenTrackError(f"every must be a whole number of at least 1, got {every!r}")
        self.trainer, self.window, self.every = trainer, window, every
        self._columns = descriptor_columns(descriptors)
        assert trainer.model is not None
        blocks = find_blocks(trainer.model)
        self._blocks = {f"layer{index}": blocks[index] for index in select_layers(layers, len(blocks))}
        self._wanted = False
        self._mask: Tensor | None = None
        self._rows: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.torch_compile:
            raise EigenTrackError(
                "SpectraCallback cannot see into a compiled model: train with torch_compile=False, or without it"
            )
        self.on_train_end(args, state, control)  # of a training that was interrupted
        assert isinstance(self.trainer.model, nn.Module)
        self._hooks.append(self.trainer.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._hooks += [block.register_forward_hook(self._keep(name)) for name, block in self._blocks.items()]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.every or max(1, int(state.logging_steps or 1))
        self._wanted = state.is_world_process_zero and (state.global_step + 1) % every == 0
        self._rows = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._wanted and self._rows:
            self.trainer.log(self._descriptors())
        self._wanted, self._rows, self._mask = False, {}, None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._wanted and not self._rows:
            mask = kwargs.get("attention_mask")
            self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _keep(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self._wanted and name not in self._rows:  # the step's first batch, and no recomputation in backward
                rows = hidden_state(output).detach()
                rows = rows.flatten(0, 1) if self._mask is None else rows[self._mask.bool()]
                if len(rows) > 1:
                    count = min(self.window, len(rows))
                    chosen = torch.arange(count, device=rows.device) * len(rows) // count
                    self._rows[name] = rows[chosen].double()  # no TensorFloat-32, no autocast

        return keep

    @torch.no_grad()
    def _descriptors(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, rows in self._rows.items():
            gram = (rows @ rows.T).float()[None, None]
            seen = torch.full((1,), len(rows), device=rows.device)
            values = spectrum_descriptors(gram, seen, rows.shape[1], normalize="rms")[0].flatten().tolist()
            found |= {f"spectra/{name}.{column}": values[place] for column, place in self._columns.items()}
        return found
