"""The training loop in PyTorch: `TorchLoop` takes the steps of `gemkit.train.run`.

Activations of a layer are recomputed in the backward pass but for the results of matrix products and of attention: the
others cost little time and most of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gemkit.arch.config import ModelConfig
from gemkit.data.batch import TokenBatch
from gemkit.models.frameworks.layers import call
from gemkit.models.torch import Decoder, Where
from gemkit.models.torch.linear import LowRank
from gemkit.models.torch.load import adapt as adapt
from gemkit.models.torch.load import load_decoder, pick_device, pick_dtype
from gemkit.models.torch.runner import TorchRunner
from gemkit.train.loop import StepMetrics
from gemkit.train.objectives.sft import loss_tokens, mean_nll, sum_nll
from gemkit.train.options import TrainOptions
from gemkit.weights.checkpoint import Tensor as Weight

_ATEN = torch.ops.aten
# Results that are kept for the backward pass; everything else of a layer is computed again
_KEPT = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
}

_NARROW = 128  # elements along the summed axis


def open_decoder(
    config: ModelConfig, weights: Mapping[str, Weight], options: TrainOptions, device: str | None, bits: int | None
) -> Decoder:
    """Load the model of a run: all of it trained, or frozen, with matrices of 8 or 4 bits if `bits` says so.

    device: see `pick_device`. Raises as `load_decoder` and `pick_dtype`.
    """
    place = pick_device(device)
    trainable = (lambda spec: True) if options.method == "full" else None
    return load_decoder(config, weights, pick_dtype(options.dtype, config, place), place, bits, trainable)


def make_runner(decoder: Decoder) -> TorchRunner:
    """Return a runner of the model in training, for samples; `TorchLoop.step` sets it to training again."""
    return TorchRunner(decoder.eval(), compile=False)


def row_norms(decoder: Decoder, name: str) -> np.ndarray:
    """Return the norm of each row of a matrix, float32 [out]."""
    weight = decoder.get_submodule(name.rpartition(".")[0]).weight
    rows, columns = weight.shape
    none = torch.zeros(1, columns, device=decoder.model.norm.weight.device)
    return LowRank(weight, none, none.new_zeros(rows, 1), 0.0).norms().cpu().numpy()


class TorchLoop:
    """Steps of AdamW on a decoder's parameters that take gradients, where they are.

    recompute: "cheap", see above; "layers", everything but the inputs of the layers; "none".
    """

    def __init__(self, decoder: Decoder, options: TrainOptions, recompute: str = "cheap") -> None:
        self.decoder, self.options = decoder, options
        self.device = decoder.model.norm.weight.device
        self.trained = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
        matrices = [p for p in self.trained.values() if p.ndim > 1]
        vectors = [p for p in self.trained.values() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, options.lr, options.betas, options.eps)
        self._run = {"cheap": _recompute_cheap, "layers": _recompute_layers, "none": call}[recompute]
        torch.manual_seed(options.seed)  # of dropout

    def step(self, batches: Sequence[TokenBatch], lr: float) -> StepMetrics:
        count, loss = loss_tokens(batches), 0.0
        self.decoder.train()
        for batch in batches:
            logprobs_R, targets_R = self._logprobs(batch, self._run)
            part = mean_nll(logprobs_R, targets_R, count, torch)
            part.backward()
            loss += part.item()
        norm, broken = self._clip(), None
        if np.isfinite(loss) and np.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        else:
            broken = next(
                (n for n, p in self.trained.items() if p.grad is not None and not p.grad.isfinite().all()), None
            )
        self.optimizer.zero_grad()
        tokens = sum(int((batch.segments > 0).sum()) for batch in batches)
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return StepMetrics(loss, tokens, count, norm, broken, memory)

    @torch.no_grad()
    def evaluate(self, batch: TokenBatch) -> tuple[float, int]:
        self.decoder.eval()
        logprobs_R, targets_R = self._logprobs(batch, call)
        return sum_nll(logprobs_R, targets_R, torch).item(), len(targets_R)

    def _logprobs(self, batch: TokenBatch, run: Callable) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and ids of the targets [R], where the batch has any."""
        tokens, targets, positions, segments = (
            torch.from_numpy(array).to(self.device)
            for array in (batch.tokens, batch.targets, batch.positions, batch.segments)
        )
        where_R = torch.from_numpy(np.flatnonzero(batch.targets >= 0)).to(self.device)
        hidden_BTD, _ = self.decoder.hidden(tokens, Where(positions, segments), run=run)
        targets_R = targets.flatten()[where_R].long()
        return self.decoder.logprobs(hidden_BTD.flatten(0, 1)[where_R], targets_R), targets_R

    def _clip(self) -> float:
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.options.clip is not None and torch.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(self.trained.values(), self.options.clip, norm)
        return norm.item()

    def state(self) -> dict[str, np.ndarray]:
        found = {f"parameter.{name}": _numpy(p) for name, p in self.trained.items()}
        for name, p in self.trained.items():
            moments = self.optimizer.state.get(p, {})
            found |= {f"{key}.{name}": _numpy(value) for key, value in moments.items()}
        found["random.cpu"] = torch.get_rng_state().numpy()
        if self.device.type == "cuda":
            found["random.cuda"] = torch.cuda.get_rng_state(self.device).numpy()
        return found

    @torch.no_grad()
    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, p in self.trained.items():
            p.copy_(torch.tensor(arrays[f"parameter.{name}"]))
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in arrays]
            self.optimizer.state[p] = {
                key: torch.tensor(arrays[f"{key}.{name}"], device="cpu" if key == "step" else self.device)
                for key in keys
            }
        torch.set_rng_state(torch.tensor(arrays["random.cpu"]))
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(torch.tensor(arrays["random.cuda"]), self.device)

    def parameters(self) -> dict[str, np.ndarray]:
        return {name: _numpy(p) for name, p in self.trained.items()}


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _recompute_layers(layer: Callable, *arguments: object) -> object:
    return checkpoint(layer, *arguments, use_reentrant=False)


def _recompute_cheap(layer: Callable, *arguments: object) -> object:
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(layer, *arguments, use_reentrant=False, context_fn=contexts)


def _policy(context: object, operation: object, *arguments: object, **options: object) -> CheckpointPolicy:
    # A product with a narrow matrix, as an adapter's, costs little and has as large a result as another
    narrow = operation is _ATEN.mm.default and arguments[0].shape[-1] < _NARROW
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT and not narrow else CheckpointPolicy.PREFER_RECOMPUTE
