"""The detector's network: linear projection, one recurrent layer, a head; and its fast form for one step at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from eigentrack.calibration import Calibration
from eigentrack.standardisation import Standardisation

CELLS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class Network(nn.Module):
    """(B, T, F) standardised descriptors -> (B, T) logits; a token's logit depends on it and on those before.

    Source: EigenTrack (arXiv 2509.15735) section III-A.
    """

    def __init__(self, features: int, cell: str, hidden: int, projection: int) -> None:
        super().__init__()
        self.cell = cell
        self.projection = nn.Linear(features, projection)
        self.recurrent = CELLS[cell](projection, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, z: Tensor) -> Tensor:
        states, _ = self.recurrent(self.projection(z))
        logits: Tensor = self.head(states)
        return logits[..., 0]


class Stepper:
    """The same network and its calibration, one token at a time, on one device.

    Deviations, projection and input weights are one matrix, made in float64, and Platt's slope is in the head;
    descriptors that the network does not know have columns of zeros, so that nothing is gathered.

    Args:
        network, standardisation, calibration: of the detector.
        columns: where the detector's descriptors are among those that a step gives.
        width: how many descriptors a step gives.
        device: of the steps.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        network: Network,
        standardisation: Standardisation,
        calibration: Calibration,
        columns: Sequence[int],
        width: int,
        device: torch.device,
    ) -> None:
        layer, head = network.recurrent, network.head
        recurrent: dict[str, Tensor] = {name: value.double() for name, value in layer.named_parameters()}
        into = recurrent["weight_ih_l0"] @ network.projection.weight.double() * standardisation.inverse
        bias = recurrent["weight_ih_l0"] @ network.projection.bias.double() + recurrent["bias_ih_l0"]

        def kept(values: Tensor) -> Tensor:
            return values.to(device, torch.float32, copy=True)

        def placed(values: Tensor) -> Tensor:
            full = values.new_zeros(*values.shape[:-1], width)
            full[..., list(columns)] = values
            return kept(full)

        self._mean, self._high, self._low = map(
            placed, (standardisation.mean, standardisation.limit, -standardisation.limit)
        )
        self._weights = placed(into), *map(kept, (recurrent["weight_hh_l0"], bias, recurrent["bias_hh_l0"]))
        self._head = (
            kept(head.bias.double() * calibration.slope + calibration.intercept),
            kept(head.weight.double().t() * calibration.slope),
        )
        self._curve = calibration.on(device) if calibration.method == "isotonic" else None
        self._cell = network.cell
        self._step: Callable[..., Tensor] = torch.gru_cell if network.cell == "gru" else torch.rnn_tanh_cell
        self.state_width = layer.hidden_size * (2 if network.cell == "lstm" else 1)
        self.device = device

    @torch.inference_mode(False)
    def start(self, batch: int) -> Tensor:
        """(B, state_width) zeros: nothing has been seen."""
        return torch.zeros(batch, self.state_width, device=self.device)

    def __call__(self, descriptors: Tensor, state: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        """(B, width) descriptors, the state before, (B, 1) bool who takes no part -> (B, 1) risks and the state after.

        The state of who takes no part stays; its risk means nothing.
        """
        if torch.is_autocast_enabled(descriptors.device.type):
            with torch.autocast(descriptors.device.type, enabled=False):
                return self._advance(descriptors, state, absent)
        return self._advance(descriptors, state, absent)

    def _advance(self, descriptors: Tensor, state: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.sub(descriptors, self._mean).clamp_(self._low, self._high).nan_to_num_(0.0)
        if self._cell == "lstm":
            both = torch.lstm_cell(x, state.chunk(2, 1), *self._weights)
            hidden, after = both[0], torch.cat(both, 1)
        else:
            hidden = after = self._step(x, state, *self._weights)
        logits = torch.addmm(self._head[0], hidden, self._head[1])
        risk = logits.sigmoid_() if self._curve is None else self._curve(logits)
        return risk, torch.where(absent, state, after)


def padded(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, T, F) with zeros behind each sequence's end, and (B, T) bool what is not padding."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    batch = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    return batch, torch.arange(batch.shape[1]) < lengths[:, None]


def token_mean(losses: Tensor, valid: Tensor) -> Tensor:
    """(B, T) -> (B,): the mean over each sequence's valid tokens."""
    return losses.masked_fill(~valid, 0).sum(1) / valid.sum(1)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, T) binary cross-entropy of each token with its sequence's (B,) label."""
    return functional.binary_cross_entropy_with_logits(
        logits, labels[:, None].expand_as(logits).to(logits.dtype), reduction="none"
    )
