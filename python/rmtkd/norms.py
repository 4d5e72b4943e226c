"""Gains and offsets of a narrowed model's norm layers, fitted to what the wide model's give."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from rmtkd.calibration import Batch, as_it_was, run
from rmtkd.errors import CalibrationError
from rmtkd.width_parts import Layer, Narrowed, Norm

ROWS = 4096  # two numbers per axis need no more: on MiniLM 1,500 rows left .2 % more error than 6,000


def fit_norms(model: nn.Module, narrowed: Narrowed, calibration: Iterable[Batch]) -> None:
    """Fits every norm's gain and offset, axis by axis, in the order of execution.

    Each batch goes through the wide model, then through the narrow one. What a narrow norm should give is the wide
    norm's output, projected; its gain and offset are the linear regression on its own normalised input, over all rows
    so far, and the rest of the pass sees them at once. So each norm makes up for what the layers before it have lost.

    Args:
        model: the wide model; unchanged.
        narrowed: its `norms` are set; nothing happens if it has none.
        calibration: batches of the model, read until every norm has seen 4,096 rows.

    Raises:
        CalibrationError: if there are no rows, or the model does not take a batch.
    """
    if not narrowed.norms:
        return
    with ExitStack() as stack:
        stack.enter_context(as_it_was(model))
        stack.enter_context(as_it_was(narrowed.model))
        fits = []
        for norm in narrowed.norms:
            fit = _Fit(norm, narrowed.model.get_submodule(norm.module))
            stack.callback(fit.finish)
            stack.callback(model.get_submodule(norm.module).register_forward_hook(fit.see_target).remove)
            stack.callback(fit.module.register_forward_hook(fit.replace).remove)
            fits.append(fit)
        for batch in calibration:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            for fit in fits:
                fit.mask = mask
            run(model, batch)
            run(narrowed.model, batch)
            if min(fit.rows for fit in fits) >= ROWS:
                break
        if any(fit.rows == 0 for fit in fits):
            raise CalibrationError("norms cannot be fitted without rows; is the calibration an iterator that was read?")


class _Fit:
    """The regression of one norm. While it runs, the module itself only normalises."""

    def __init__(self, norm: Norm, module: Layer) -> None:
        self.module, self.projection = module, norm.projection
        self.gain = module.weight.detach().double().clone()
        self.offset = module.bias.detach().double().clone()
        self.mask: Tensor | None = None
        self.rows = 0
        self._target = torch.empty(0)
        self._sums = torch.zeros(4, len(self.gain), dtype=torch.float64, device=self.gain.device)
        self._set(torch.ones_like(self.gain), torch.zeros_like(self.offset))

    def see_target(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._target = _rows(output, self.mask).double() @ self.projection

    def replace(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        rows = _rows(output, self.mask).double()
        target, self._target = self._target, torch.empty(0)
        self.rows += len(rows)
        self._sums += torch.stack((rows.sum(0), target.sum(0), rows.square().sum(0), (rows * target).sum(0)))
        x, y, xx, xy = self._sums / self.rows
        variance = xx - x * x
        self.gain = torch.where(variance > 1e-9 * xx, (xy - x * y) / variance, self.gain)
        self.offset = y - self.gain * x
        shape = (1, -1, 1, 1) if output.dim() == 4 else (-1,)
        fitted: Tensor = output * self.gain.to(output).view(shape) + self.offset.to(output).view(shape)
        return fitted

    def finish(self) -> None:
        """Writes the regression down; for a batch norm as gain and offset of the input it really has by now."""
        if getattr(self.module, "running_mean", None) is not None and self.rows:
            mean = self._sums[0] / self.rows
            variance = self._sums[2] / self.rows - mean * mean
            scale = self.module.running_var.double() + self.module.eps
            self.module.running_mean.add_((scale.sqrt() * mean).to(self.module.running_mean))
            self.module.running_var.copy_((scale * variance - self.module.eps).clamp(min=0))
            self.offset = self.offset + self.gain * mean
            self.gain = self.gain * variance.clamp(min=self.module.eps / scale).sqrt()
        self._set(self.gain, self.offset)

    def _set(self, gain: Tensor, offset: Tensor) -> None:
        with torch.no_grad():
            self.module.weight.copy_(gain)
            self.module.bias.copy_(offset)


def _rows(activation: Tensor, mask: Tensor | None) -> Tensor:
    """(n, d): the rows that count, of (B, T, d) tokens or (B, C, H, W) images."""
    if activation.dim() == 4:
        activation = activation.movedim(1, -1)
    if mask is not None and mask.shape == activation.shape[:-1]:
        activation = activation[mask.to(activation.device) != 0]
    return activation.flatten(0, -2)
