"""K-FAC as a preconditioner around any optimizer, in reading order.

linalg        symmetric matrices
factors       Statistics, Pair, Factors: values and running averages
convolution   factors of convolutions without unfolding
layers        every supported module as output = input @ weight.T + bias
attention     nn.MultiheadAttention, whose own modules are never called
solvers       decompose (costly) and solve (cheap)
decompositions  what is held of every layer between two inverse steps
coverage      which layers are preconditioned, and why the others are not
fisher, damping, trust_region   the choices of a step
capture       hooks: one backward pass in, Statistics out
mean          factors over a data set, at fixed weights
exporters     factors for laplace-torch, kronfluence and curvlinops
preconditioner  the step, in phases
"""

from kaisa.kfac.coverage import Coverage, CoverageRow
from kaisa.kfac.damping import LevenbergMarquardt
from kaisa.kfac.exporters import to_curvlinops, to_kronfluence, to_laplace
from kaisa.kfac.factors import Factors, Label, Pair, Statistics
from kaisa.kfac.fisher import Fisher
from kaisa.kfac.layers import Layer, LayerOptions, MatrixLayer, NotCovered, register
from kaisa.kfac.mean import mean_factors
from kaisa.kfac.payload import Payload
from kaisa.kfac.placement import Placement
from kaisa.kfac.preconditioner import KFACPreconditioner
from kaisa.kfac.solvers import EKFAC, Cholesky, Eigen, Solver, WarmStart
from kaisa.kfac.trust_region import FisherNorm, Graft, KLClip, NormConstraint, TrustRegion

__all__ = [
    "EKFAC",
    "Cholesky",
    "Coverage",
    "CoverageRow",
    "Eigen",
    "Factors",
    "Fisher",
    "FisherNorm",
    "Graft",
    "KFACPreconditioner",
    "KLClip",
    "Label",
    "Layer",
    "LayerOptions",
    "LevenbergMarquardt",
    "MatrixLayer",
    "NormConstraint",
    "NotCovered",
    "Pair",
    "Payload",
    "Placement",
    "Solver",
    "Statistics",
    "TrustRegion",
    "WarmStart",
    "mean_factors",
    "register",
    "to_curvlinops",
    "to_kronfluence",
    "to_laplace",
]
