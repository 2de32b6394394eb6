"""Optimizers of their own, of the shape of `torch.optim`: they work alone, and RSG and ARSG behind K-FAC too."""

from kaisa.optim.adahessian import AdaHessian
from kaisa.optim.arsg import ARSG, FINE
from kaisa.optim.observation_boost import AtEpoch, AtPlateau, AtRate, ObservationBoost
from kaisa.optim.rsg import RSG

__all__ = ["ARSG", "FINE", "RSG", "AdaHessian", "AtEpoch", "AtPlateau", "AtRate", "ObservationBoost"]
