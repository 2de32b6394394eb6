"""Which layers of a model are preconditioned, how, and what is left to the base optimizer and why."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from re import Pattern

from torch import nn
from torch.nn.parameter import UninitializedParameter

from kaisa.errors import ConfigurationError
from kaisa.kfac.layers import Embedding, Layer, LayerOptions, Linear, NotCovered, TiedEmbedding, factory_of
from kaisa.kfac.norms import Norm


@dataclass(frozen=True)
class CoverageRow:
    """What happens to the parameters that one module owns.

    Attributes:
        name, type: of the module.
        treatment: how its gradient is preconditioned, or why it is left as it is.
        parameters: how many trainable numbers this row speaks of.
        covered: whether they are preconditioned.
    """

    name: str
    type: str
    treatment: str
    parameters: int
    covered: bool


@dataclass(frozen=True)
class Coverage:
    """The rows of all modules that own trainable parameters; printable."""

    rows: tuple[CoverageRow, ...]

    def __iter__(self) -> Iterator[CoverageRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def share(self) -> float:
        """The share of trainable parameters that are preconditioned, 0 to 1."""
        total = sum(row.parameters for row in self.rows)
        return sum(row.parameters for row in self.rows if row.covered) / total if total else 0.0

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows], default=0)
        kind = max([len(row.type) for row in self.rows], default=0)
        lines = [
            f"{row.name:<{width}}  {row.type:<{kind}}  {row.parameters:>12,}  "
            f"{row.treatment if row.covered else 'left to the optimizer: ' + row.treatment}"
            for row in self.rows
        ]
        return "\n".join([*lines, f"{self.share:.1%} of the parameters are preconditioned"])


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the user's module inside DistributedDataParallel, DataParallel or torch.compile."""
    inner = model._modules.get("_orig_mod")
    if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
        inner = model._modules["module"]
    return model if inner is None else unwrapped(inner)


def discover(
    model: nn.Module, options: LayerOptions, skip: Sequence[Pattern[str]], sharing: str, norm_sharing: str
) -> tuple[list[Layer], Coverage]:
    """Finds the layers of an unwrapped model.

    Args:
        model: the model.
        options: what to cover.
        skip: patterns of module names or type names to leave out.
        sharing: the treatment of shared weights of all layers but normalisation.
        norm_sharing: that of normalisation layers.

    Returns:
        The layers in the model's order, and what was decided about every module.

    Raises:
        ConfigurationError: a lazy module has no shapes yet.
    """
    survey = _Survey(options)
    for name, module in model.named_modules():
        survey.visit(_plain(name), module, skip)
    layers = list(survey.layers.values())
    for layer in layers:
        layer.sharing = norm_sharing if isinstance(layer, Norm) else sharing
    return layers, Coverage(tuple(survey.rows))


def _plain(name: str) -> str:
    wrappers = ("_orig_mod", "_checkpoint_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


class _Survey:
    """Goes through the modules once; remembers which layer owns which parameter."""

    def __init__(self, options: LayerOptions) -> None:
        self.options = options
        self.layers: dict[str, Layer] = {}
        self.rows: list[CoverageRow] = []
        self._owner: dict[nn.Parameter, Layer] = {}
        self._counted: set[nn.Parameter] = set()

    def visit(self, name: str, module: nn.Module, skip: Sequence[Pattern[str]]) -> None:
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        own += self._attention_output(module)
        if any(isinstance(parameter, UninitializedParameter) for parameter in own):
            raise ConfigurationError(f"{name} has no shapes yet; run one forward pass through the model first")
        if not own or (all(parameter in self._counted for parameter in own) and not self._ties(module)):
            return
        factory = factory_of(module)
        if any(pattern.search(name) or pattern.search(type(module).__name__) for pattern in skip):
            self._leave(name, module, own, "skipped by skip_layers")
        elif factory is None:
            self._leave(name, module, own, "no rule for this module type")
        else:
            self._try(name, module, own)

    def _attention_output(self, module: nn.Module) -> list[nn.Parameter]:
        if not isinstance(module, nn.MultiheadAttention):
            return []
        return [parameter for parameter in module.out_proj.parameters() if parameter.requires_grad]

    def _ties(self, module: nn.Module) -> bool:
        return module._parameters.get("weight") in self._owner

    def _try(self, name: str, module: nn.Module, own: list[nn.Parameter]) -> None:
        try:
            weight = module._parameters.get("weight")
            if weight in self._owner:
                self._tie(name, module, self._owner[weight])
                return
            layers = self._make(name, module)
        except NotCovered as reason:
            self._leave(name, module, own, str(reason))
            return
        for layer in layers:
            self.layers[layer.name] = layer
            self._owner.setdefault(layer.weight, layer)
        covered = {parameter for layer in layers for parameter in layer.parameters}
        self._row(name, module, [p for p in own if p in covered], layers[0].treatment, True)
        self._leave(
            name, module, [p for p in own if p not in covered], "frozen weight or not part of the layer's matrix"
        )

    def _make(self, name: str, module: nn.Module) -> list[Layer]:
        factory = factory_of(module)
        assert factory is not None
        made = factory(name, module, self.options)
        layers = [made] if isinstance(made, Layer) else list(made)
        trained = [layer for layer in layers if layer.weight.requires_grad]
        if not trained:
            raise NotCovered("frozen weight")
        if not all(isinstance(parameter, nn.Parameter) for layer in trained for parameter in layer.parameters):
            raise NotCovered("its weight is computed from other parameters")
        if any(parameter.is_complex() for layer in trained for parameter in layer.parameters):
            raise NotCovered("complex parameters")
        return trained

    def _tie(self, name: str, module: nn.Module, owner: Layer) -> None:
        """Adds a module that shares the weight of an earlier layer, where there is a rule for the two uses."""
        if type(owner) is Embedding and factory_of(module) is Linear and isinstance(module, nn.Linear):
            self.layers[owner.name] = tied = TiedEmbedding(owner, module)
            self._owner[owner.weight] = tied
            self._reword(owner.name, tied.treatment, True)
        elif type(module) in [type(m) for m in owner.modules] and not isinstance(owner, Norm):
            owner.modules = (*owner.modules, module)
            if owner.bias is not None and owner.bias is not module._parameters.get("bias"):
                raise NotCovered(self._drop(owner, f"shares its weight, but not its bias, with {name}"))
        else:
            raise NotCovered(self._drop(owner, f"shares its weight with {name}, and there is no rule for the two uses"))
        extra = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        self._leave(name, module, extra, f"bias beside a weight shared with {owner.name}")

    def _drop(self, owner: Layer, reason: str) -> str:
        del self.layers[owner.name]
        self._reword(owner.name, reason, False)
        return f"shares its weight with {owner.name}"

    def _reword(self, name: str, text: str, covered: bool) -> None:
        self.rows = [replace(row, treatment=text, covered=covered) if row.name == name else row for row in self.rows]

    def _leave(self, name: str, module: nn.Module, parameters: list[nn.Parameter], reason: str) -> None:
        self._row(name, module, parameters, reason, False)

    def _row(self, name: str, module: nn.Module, parameters: list[nn.Parameter], text: str, covered: bool) -> None:
        new = [parameter for parameter in parameters if parameter not in self._counted]
        self._counted.update(new)
        if new:
            size = sum(parameter.numel() for parameter in new)
            self.rows.append(CoverageRow(name, type(module).__name__, text, size, covered))
