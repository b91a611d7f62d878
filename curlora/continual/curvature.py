"""Curvature of a loss in the coordinates of an adapter with frozen factors, Kronecker-factored (K-FAC).

Where a layer trains one square matrix U between two frozen factors, all that U does passes through two r-vectors per
token: z, which U reads, and c, the gradient of the loss with respect to what U puts out. ∂L/∂U = Σ_tokens c zᵀ, and
the curvature of L in U is, Kronecker-factored, two r×r matrices:

    Γ = Σ c cᵀ / predictions        S = Σ ‖c‖² z zᵀ / Σ ‖c‖²        ½ tr(Γ D S Dᵀ) ≈ change of L by U → U + D

in nats per prediction, if the targets are drawn from the model itself (then Γ ⊗ S is the Fisher information). It is
the full-space form ½ tr(G ΔW A ΔWᵀ), G over the layer's outputs and A over its inputs, restricted to the adapter. The
weights ‖c‖² make the trace of Γ ⊗ S exact and leave out tokens that no prediction depends on, such as padding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from curlora.active import alone
from curlora.continual.parameters import adapter_parameters, read, require_adapter, write
from curlora.continual.strategy import Example, TaskContext
from curlora.core import CurloraCore
from curlora.layer import CurloraLayer

ROWS = 8  # examples per pass

See = Callable[[Tensor, Tensor], None]
"""Called in the backward pass with z and c of some tokens, (tokens, r) each."""


@dataclass(frozen=True)
class Factors:
    """Γ and S (r, r), fp32, by the name of the trainable matrix."""

    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]

    def scaled(self, by: float) -> Factors:
        """The same curvature, `by` times as large."""
        return Factors({name: by * value for name, value in self.outputs.items()}, self.inputs)


# ------------------------------------------------------------------------------------- where the matrices sit


def sites(model: nn.Module) -> dict[str, Callable[[See], list]]:
    """Name of each trainable matrix → a function that attaches an observer and returns the handles of its hooks.

    Raises:
        ValueError: some layer trains anything else than one square matrix between frozen factors.
    """
    require_adapter(model, "it measures the curvature over an adapter")
    left = adapter_parameters(model)
    names = {id(parameter): name for name, parameter in left.items()}
    found = {}
    for key, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            own = [names[id(p)] for p in layer.parameters() if id(p) in names]
            if own:
                found[own[0]] = _site(key, layer, own, left)
    strangers = left.keys() - found.keys()
    if strangers:
        raise ValueError(f"{min(strangers)} trains outside the adapted layers, where no factors are frozen; {_REMEDY}")
    return found


_REMEDY = "use adapter.type: curlora"


def _site(key: str, layer: BaseTunerLayer, own: list[str], parameters: Mapping[str, nn.Parameter]):
    parameter = parameters[own[0]]
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if len(own) > 1 or len(shape) != 2 or shape[0] != shape[1]:
        trained = f"{len(own)} parameters" if len(own) > 1 else f"a parameter of shape {shape}"
        raise ValueError(
            f"{key} trains {trained}, but the curvature is measured between two frozen factors, over one square "
            f"matrix per layer; {_REMEDY}"
        )
    if isinstance(layer, CurloraLayer):
        return partial(_observe_curlora, layer, _core(key, layer, parameter))
    for module in layer.modules():
        if getattr(module, "weight", None) is parameter and _multiplies(module):
            return partial(_observe_matrix, module)
    raise ValueError(f"{key} of type {type(layer).__name__} does not multiply by what it trains; {_REMEDY}")


def _core(key: str, layer: CurloraLayer, parameter: nn.Parameter) -> CurloraCore:
    core = next(core for core in layer.curlora_core.values() if core.U is parameter)
    if core.settings.blocks > 1 or core.settings.config.max_update_norm is not None:
        what = "a stack of blocks" if core.settings.blocks > 1 else "max_update_norm, which rescales U"
        raise ValueError(f"{key} has {what}; the curvature is measured over one U as it is trained")
    return core


def _multiplies(module: nn.Module) -> bool:
    """Whether the module computes z Uᵀ with its weight: a linear layer, or PSOFT's with `psoft_orth=False`."""
    if type(module) is nn.Linear:
        return module.bias is None
    return type(module).__name__ == "OrthLayer" and not module.orth and module.vector_a is module.vector_b is None


def _observe_curlora(layer: CurloraLayer, core: CurloraCore, see: See) -> list:
    """z from the frozen layer, c from the gradient of the adapted layer's output.

    Gradient checkpointing runs a forward pass twice, but backpropagates one of them: z waits with the output whose
    gradient it belongs to.
    """
    read: list[Tensor] = []

    def after_base(module, inputs, output: Tensor) -> None:
        z = layer.rows_output(inputs[0], layer.channels_last(output), alone(core)).detach().float()
        read[:] = [z if core.right is None else z @ core.right.t()]

    def after_layer(module, inputs, output: Tensor) -> None:
        if output.requires_grad and read:
            z = read.pop()

            def of_gradient(gradient: Tensor) -> None:
                c = layer.channels_last(gradient) @ core.columns.to(gradient.dtype)
                see(_flat(z), _flat(c.float() @ core.left))

            output.register_hook(of_gradient)

    return [layer.base_layer.register_forward_hook(after_base), layer.register_forward_hook(after_layer)]


def _observe_matrix(module: nn.Module, see: See) -> list:
    def after(module, inputs, output: Tensor) -> None:
        if output.requires_grad:
            z = inputs[0].detach()
            output.register_hook(lambda gradient: see(_flat(z).float(), _flat(gradient).float()))

    return [module.register_forward_hook(after)]


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


@contextlib.contextmanager
def observed(model: nn.Module, see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, every backward pass calls see(name, z, c) for each trainable matrix that its loss depends on."""
    handles = [handle for name, attach in sites(model).items() for handle in attach(partial(see, name))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------- estimation


class Sums:
    """Running sums of one matrix, (r, r) fp64 each: c cᵀ, ‖c‖² z zᵀ, and ‖c‖²."""

    def __init__(self, size: int, device: torch.device):
        self.values = torch.zeros(2 * size * size + 1, dtype=torch.float64, device=device)
        outputs, inputs, self.weight = self.values.split([size * size, size * size, 1])
        self.outputs, self.inputs = outputs.view(size, size), inputs.view(size, size)

    def add(self, z: Tensor, c: Tensor) -> None:
        weights = c.square().sum(-1, keepdim=True)
        self.outputs += c.t() @ c
        self.inputs += (weights * z).t() @ z
        self.weight += weights.sum()


def measure(model: nn.Module, task: TaskContext, examples: Sequence[Example], draw: bool = True) -> Factors:
    """Curvature of the summed loss of `examples` per prediction, at the current weights; a collective call.

    Examples are divided among the ranks in fixed groups and summed in fp64, so that the number of workers changes at
    most the last bits. `torch.autograd.grad` leaves DeepSpeed's gradient reduction and `.grad` alone.

    Args:
        draw: whether the model draws the targets; False where the examples are its own text.
    """
    if task.losses is None or (draw and task.draw is None):
        raise ValueError("the curvature needs TaskContext.losses and TaskContext.draw")
    parameters = adapter_parameters(model)
    sums: dict[str, Sums] = {}
    counted = True

    def see(name: str, z: Tensor, c: Tensor) -> None:
        if counted:
            sums.setdefault(name, Sums(z.shape[-1], z.device)).add(z, c)

    with observed(model, see):
        for own, loss in _passes(model, task, examples, draw):
            counted = own
            torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return _factors(parameters, sums, task, sum(map(predictions, examples)))


def _passes(model: nn.Module, task: TaskContext, examples, draw: bool = False) -> Iterator[tuple[bool, Tensor]]:
    """(whether it counts on this rank, summed loss) of groups of examples that are divided among the ranks.

    A rank without a group repeats one and discards the result: under ZeRO-3 all ranks must run the pass.
    """
    groups = [examples[first : first + ROWS] for first in range(0, len(examples), ROWS)]
    was_training = model.training
    model.eval()  # without dropout
    for first in range(0, len(groups), task.size):
        counted = first + task.rank < len(groups)
        number = first + task.rank if counted else first
        group = groups[number]
        if draw:
            group = task.draw(model, group, (task.seed, task.position, number))
        losses = task.losses(model, group)
        yield counted, (losses * losses.new_tensor([predictions(example) for example in group])).sum()
    model.train(was_training)


def mean_loss(model: nn.Module, task: TaskContext, examples: Sequence[Example]) -> float:
    """Loss per prediction, in nats; a collective call."""
    total = torch.zeros(1, dtype=torch.float64)
    with torch.no_grad():
        for counted, loss in _passes(model, task, examples):
            total += float(loss) if counted else 0.0
    return float(task.total(total)) / max(sum(map(predictions, examples)), 1)


def gradient(model: nn.Module, task: TaskContext, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Of the summed loss, by parameter name, fp32 on the CPU; a collective call."""
    parameters = adapter_parameters(model)
    found = {name: torch.zeros(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    for counted, loss in _passes(model, task, examples):
        for name, value in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            found[name] += value.float().cpu() if counted else 0.0
    return {name: task.total(value) for name, value in found.items()}


PROBE = 0.02  # nats that a probe's step should cost according to the factors


def coherence(
    model: nn.Module, task: TaskContext, factors: Factors, rows: Sequence[Example], examples: Sequence[Example]
) -> float:
    """How many times the measured change of the loss of `rows` exceeds the one that `factors` predict.

    The factors take layers as independent, but training moves them together. So the change is measured along the sign
    of the gradient of `examples`, the direction of Adam's first step, where it comes out 2 to 3 times as large. A
    collective call that leaves the weights as they are; `rows` must be those of `factors`, around the current weights.
    """
    parameters = adapter_parameters(model)
    here = read(parameters)
    ways = {name: -value.sign().to(here[name].device) for name, value in gradient(model, task, examples).items()}
    unit = sum(
        float(quadratic(way, factors.outputs[name].to(way.device), factors.inputs[name].to(way.device)))
        for name, way in ways.items()
    )
    if not unit:
        return 1.0
    before = mean_loss(model, task, rows)
    step = math.sqrt(PROBE / unit)
    write(parameters, {name: value + step * ways[name] for name, value in here.items()})
    after = mean_loss(model, task, rows)
    write(parameters, here)
    return max((after - before) / PROBE, 1.0)


def _factors(parameters, sums: dict[str, Sums], task: TaskContext, count: int) -> Factors:
    outputs, inputs = {}, {}
    for name, parameter in parameters.items():
        size = getattr(parameter, "ds_shape", parameter.shape)[0]
        total = Sums(size, torch.device("cpu"))
        if name in sums:
            total.values += sums[name].values.cpu()
        task.total(total.values)
        outputs[name] = (total.outputs / max(count, 1)).float()
        inputs[name] = (total.inputs / total.weight.clamp_min(torch.finfo(torch.float64).tiny)).float()
    return Factors(outputs, inputs)


def predictions(example: Example) -> int:
    """Number of targets of an example: tokens that are predicted, or one class."""
    if example.labels is None:
        return int(example.target >= 0)
    return sum(label >= 0 for label in example.labels[1:])


# ------------------------------------------------------------------------------------------ the quadratic form


def quadratic(moved: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """½ tr(Γ D S Dᵀ), summed over all leading dimensions; D, Γ and S (…, r, r)."""
    return (outputs @ moved @ inputs * moved).sum() / 2


def proximal(moved: Tensor, outputs: Tensor, inputs: Tensor, step: float) -> Tensor:
    """argmin over X of ½‖X − D‖² + step · ½ tr(Γ X S Xᵀ), exactly, in the joint eigenbasis of Γ and S."""
    g, left = torch.linalg.eigh(outputs)
    s, right = torch.linalg.eigh(inputs)
    rotated = left.mT @ moved @ right
    shrunk = rotated / (1 + step * g.clamp_min(0)[..., :, None] * s.clamp_min(0)[..., None, :])
    return left @ shrunk @ right.mT


def pooled(outputs: Tensor, inputs: Tensor, rounds: int = 20) -> tuple[Tensor, Tensor]:
    """The Kronecker product Γ ⊗ S nearest to Σ_t Γ_t ⊗ S_t in the Frobenius norm, by power iteration.

    Γ_t and S_t (tasks, …, r, r), positive semidefinite, and so are the results (…, r, r).
    """
    second = inputs.sum(0)
    for _ in range(rounds):
        first = (_overlap(inputs, second) * outputs).sum(0) / _overlap(second, second).clamp_min(_TINY)
        second = (_overlap(outputs, first) * inputs).sum(0) / _overlap(first, first).clamp_min(_TINY)
    return first, second


_TINY = math.ldexp(1.0, -120)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1), keepdim=True)
