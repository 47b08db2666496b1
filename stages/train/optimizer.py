"""The three optimizer groups, the averaging of gradients over ranks, and the moving average of the weights (#1493)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stages.parallel import World
from stages.train.model import Model, is_matrix
from stages.train.muon import Muon
from stages.train.params import TrainParams
from stages.train.schedule import StepSchedule


class Optimizers:
    """AdamW for the embedding, Muon for the block matrices, AdamW for every vector; weight decay is decoupled everywhere."""

    def __init__(self, model: Model, params: TrainParams, world: World) -> None:
        self.params = params
        self.world = world
        self.parameters = list(model.parameters())
        matrices: list[Tensor] = [parameter for name, parameter in model.named_parameters() if is_matrix(name)]
        scalars = [parameter for name, parameter in model.named_parameters() if not is_matrix(name) and name != "embedding.weight"]
        self.muon = Muon(matrices, params.matrix_weight_decay, params.newton_schulz_steps, world)
        self.embedding = self._adam([model.embedding.weight], params.embedding_weight_decay)
        self.scalars = self._adam(scalars, params.scalar_weight_decay)

    def step(self, settings: StepSchedule) -> None:
        """Average gradients over ranks, clip their global norm, update, and clear them. Nothing waits for the device."""
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.params.clip_norm)
        for adam, lr in ((self.embedding, self.params.embedding_lr), (self.scalars, self.params.scalar_lr)):
            adam.param_groups[0]["lr"] = lr * settings.lr_multiplier
            adam.step()
        self.muon.step(self.params.matrix_lr * settings.lr_multiplier, settings.momentum)
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs of this rank."""
        return {
            "embedding": self.embedding.state_dict(),
            "scalars": self.scalars.state_dict(),
            "momenta": self.muon.momenta,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.embedding.load_state_dict(state["embedding"])
        self.scalars.load_state_dict(state["scalars"])
        self.muon.momenta = [momentum.to(self.world.device) for momentum in state["momenta"]]

    def _adam(self, parameters: Sequence[Tensor], weight_decay: float) -> torch.optim.AdamW:
        betas = (self.params.adam_beta1, self.params.adam_beta2)
        fused = self.world.device.type == "cuda"
        return torch.optim.AdamW(parameters, lr=0.0, betas=betas, eps=self.params.adam_eps, weight_decay=weight_decay, fused=fused)

    def _average_gradients(self) -> None:
        if self.world.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self.parameters:
            if parameter.grad is None:  # the empty skips of a one-layer model; the ranks agree on it
                continue
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            flat = self.world.mean_(torch.cat([gradient.flatten() for gradient in gradients]))
            pieces = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])


class MovingAverage:
    """Exponential moving average of all parameters in float32, started at the initial weights; no bias correction."""

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model = model
        self.average = [parameter.detach().float().clone() for parameter in model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * weights."""
        weights = [parameter.float() for parameter in self.model.parameters()]
        torch._foreach_lerp_(self.average, weights, 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by name, float32, on the CPU."""
        names = [name for name, _ in self.model.named_parameters()]
        return {name: tensor.cpu().contiguous() for name, tensor in zip(names, self.average, strict=True)}
