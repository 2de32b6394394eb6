"""What a model looks at: explanations of inputs and of models, with figures that say how good they are."""

from kaisa.explain.comparison import Comparison, Effort, compare, measure
from kaisa.explain.explanation import Explanation
from kaisa.explain.front import explain
from kaisa.explain.influence import Curvature, Examples
from kaisa.explain.maximisation import Priors
from kaisa.explain.registry import Method, methods

__all__ = [
    "Comparison",
    "Curvature",
    "Effort",
    "Examples",
    "Explanation",
    "Method",
    "Priors",
    "compare",
    "explain",
    "measure",
    "methods",
]
