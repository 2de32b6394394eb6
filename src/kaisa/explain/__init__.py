"""What a model looks at: explanations of inputs and of models, with figures that say how good they are."""

from kaisa.explain.explanation import Explanation
from kaisa.explain.front import explain
from kaisa.explain.registry import Method, methods

__all__ = ["Explanation", "Method", "explain", "methods"]
