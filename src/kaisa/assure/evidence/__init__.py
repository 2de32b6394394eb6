"""What may be said of a network before it works: evidence from data, from training and from its curvature.

held_out      errors on data that had no part in making it
pac_bayes     a bound from the training data and the distance from the initial weights
partition     cells of inputs, weighted by the operational profile
robustness    whether small changes of an input change the answer
posterior     uncertain weights, uncertain predictions, foreign inputs
calibration   whether confidence is what it is worth
shift         whether new data still come from the profile
findings      how each becomes a piece of evidence in a case
"""

from kaisa.assure.evidence.calibration import Calibration, fit_temperature, measure_calibration
from kaisa.assure.evidence.findings import Finding, digest_input, digest_inputs, present
from kaisa.assure.evidence.held_out import HeldOut
from kaisa.assure.evidence.pac_bayes import GeneralisationBound, bound_generalisation, kl_inverse, pac_bayes_bound
from kaisa.assure.evidence.partition import Cell, Clusters, Grid, PartitionReliability, count_cells
from kaisa.assure.evidence.posterior import Posterior, Prediction
from kaisa.assure.evidence.robustness import Robustness, certify_robustness, search_robustness
from kaisa.assure.evidence.shift import ShiftTest, compare_counts, compare_features

__all__ = [
    "Calibration",
    "Cell",
    "Clusters",
    "Finding",
    "GeneralisationBound",
    "Grid",
    "HeldOut",
    "PartitionReliability",
    "Posterior",
    "Prediction",
    "Robustness",
    "ShiftTest",
    "bound_generalisation",
    "certify_robustness",
    "compare_counts",
    "compare_features",
    "count_cells",
    "digest_input",
    "digest_inputs",
    "fit_temperature",
    "kl_inverse",
    "measure_calibration",
    "pac_bayes_bound",
    "present",
    "search_robustness",
]
