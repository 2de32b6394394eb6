"""Second-order training of deep networks in PyTorch, and what its curvature tells about them afterwards."""

from kaisa.errors import ConfigurationError, DataError, DecompositionError, KaisaError, StateError
from kaisa.kfac.planning import plan
from kaisa.kfac.preconditioner import KFACPreconditioner

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "DataError",
    "DecompositionError",
    "KFACPreconditioner",
    "KaisaError",
    "StateError",
    "__version__",
    "plan",
]
