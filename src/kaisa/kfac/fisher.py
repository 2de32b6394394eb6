"""Which Fisher matrix the factor G estimates.

    empirical                           gradients of the loss at the labels, from the backward pass that runs anyway
    categorical, gaussian, bernoulli    gradients at labels sampled from the model's own prediction (an extra backward
                                        pass on factor steps), or with ``exact`` the expectation over them (one pass a
                                        class or output), which is the generalised Gauss–Newton matrix

For the summed loss of one example with outputs z, p = softmax(z) or sigmoid(z):

    kind         loss                sampled gradient     columns of the square root of the Hessian
    categorical  cross-entropy       p − onehot(y)        √p_c (e_c − p)
    bernoulli    binary cross-ent.   p − y                √(p (1 − p)) e_c
    gaussian     ½ β ‖z − y‖²        √β ε                 √β e_c
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kaisa.errors import ConfigurationError

_KINDS = ("empirical", "categorical", "gaussian", "bernoulli")


@dataclass(frozen=True)
class Fisher:
    """A predictive distribution and how its expectation is taken.

    Attributes:
        kind: "empirical", "categorical", "gaussian" or "bernoulli".
        exact: takes the expectation over labels instead of one sample.
        class_dim: the dimension of the outputs that holds the classes.
        precision: β of the Gaussian; 2 / D makes it the Fisher of ``nn.MSELoss`` on D outputs an example.

    Raises:
        ConfigurationError: unknown kind, non-positive precision, or an exact empirical Fisher.
    """

    kind: str = "empirical"
    exact: bool = False
    class_dim: int = -1
    precision: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ConfigurationError(f"fisher is {self.kind!r}; give one of {', '.join(_KINDS)}, or a Fisher")
        if self.precision <= 0:
            raise ConfigurationError(f"the precision of the Gaussian is {self.precision}; give a positive number")
        if self.exact and self.kind == "empirical":
            raise ConfigurationError("the empirical Fisher has no expectation over labels; leave out exact=True")

    def output_gradients(self, outputs: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Yields gradients of the summed loss at the outputs, one a backward pass, in the shape of the outputs."""
        by_class = outputs.detach().movedim(self.class_dim, -1)
        gradients = self._columns(by_class) if self.exact else self._sample(by_class, generator)
        for gradient in gradients:
            yield gradient.movedim(-1, self.class_dim)

    def _sample(self, outputs: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        if self.kind == "gaussian":
            noise = torch.empty_like(outputs, device=generator.device).normal_(generator=generator)
            yield noise.to(outputs.device) * self.precision**0.5
            return
        probabilities = outputs.softmax(-1) if self.kind == "categorical" else outputs.sigmoid()
        uniform = torch.rand(outputs.shape, generator=generator, dtype=torch.float64, device=generator.device)
        uniform = uniform.to(outputs.device)
        if self.kind == "bernoulli":
            yield probabilities - (uniform < probabilities).to(outputs.dtype)
            return
        # Gumbel's trick draws all labels at once without reading a probability on the host.
        noise = -(-uniform.clamp(1e-300, 1 - 1e-16).log()).log()
        labels = (outputs.double() + noise).argmax(-1)
        yield probabilities - torch.nn.functional.one_hot(labels, outputs.shape[-1]).to(outputs.dtype)

    def _columns(self, outputs: Tensor) -> Iterator[Tensor]:
        for index in range(outputs.shape[-1]):
            unit = torch.zeros_like(outputs)
            unit[..., index] = 1
            if self.kind == "gaussian":
                yield unit * self.precision**0.5
            elif self.kind == "bernoulli":
                p = outputs.sigmoid()
                yield unit * (p * (1 - p)).sqrt()
            else:
                p = outputs.softmax(-1)
                yield p[..., index, None].sqrt() * (unit - p)


def named(fisher: str | Fisher) -> Fisher:
    """Returns the Fisher of a kind, or the Fisher itself."""
    return fisher if isinstance(fisher, Fisher) else Fisher(fisher)
