"""What the five small trainings share: a learning rate that warms up and decays, one optimizer step, an average of weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import nn


def train(
    modules: Iterable[nn.Module],
    loss_at: Callable[[int], torch.Tensor],
    *,
    name: str,
    steps: int,
    rate: float,
    decay_from: float = 0.3,
    betas: tuple[float, float] = (0.9, 0.99),
    after_step: Callable[[], None] | None = None,
) -> None:
    """Runs `steps` AdamW steps on `loss_at(step)`: 100 steps of warm-up, linear decay to 3 % over the rest after `decay_from`."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=0.0, fused=True)
    started, running = time.perf_counter(), 0.0
    for step in range(steps):
        late = max(0.0, (step / steps - decay_from) / (1 - decay_from))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (1 - 0.97 * late)
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if after_step:
            after_step()
        running = 0.98 * running + 0.02 * loss.item() if step else loss.item()
        if (step + 1) % 100 == 0:
            print(f"{name} {step + 1}/{steps} loss {running:.4f} {time.perf_counter() - started:.0f} s", flush=True)


class WeightAverage:
    """Exponential moving average of modules' parameters, ramped so that the first steps do not linger."""

    def __init__(self, modules: Iterable[nn.Module], decay: float = 0.998) -> None:
        self._live = [p for m in modules for p in m.parameters()]
        self._mean = [p.detach().clone() for p in self._live]
        self._decay, self._steps = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the live weights."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        torch._foreach_lerp_(self._mean, [p.detach() for p in self._live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the live weights and the average; call again to go back."""
        for live, mean in zip(self._live, self._mean, strict=True):
            kept = live.detach().clone()
            live.copy_(mean)
            mean.copy_(kept)
