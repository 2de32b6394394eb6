"""Fully quantised training: unbiased low-bit gradients, and what they cost in variance (arXiv 2010.14298)."""

from kaisa.quantize.bits import allocate_bits
from kaisa.quantize.config import QuantConfig
from kaisa.quantize.prepare import convert, load_ranges, prepare, quantized_layers, ranges_of, set_mode
from kaisa.quantize.quantizers import quantize
from kaisa.quantize.report import VarianceReport, variance_report
from kaisa.quantize.variance import exact_variance, variance_bound

__all__ = [
    "QuantConfig",
    "VarianceReport",
    "allocate_bits",
    "convert",
    "exact_variance",
    "load_ranges",
    "prepare",
    "quantize",
    "quantized_layers",
    "ranges_of",
    "set_mode",
    "variance_bound",
    "variance_report",
]
