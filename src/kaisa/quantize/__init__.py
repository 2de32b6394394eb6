"""Fully quantised training: unbiased low-bit gradients, and what they cost in variance (arXiv 2010.14298)."""

from kaisa.quantize.quantizers import quantize
from kaisa.quantize.variance import exact_variance, variance_bound

__all__ = ["exact_variance", "quantize", "variance_bound"]
