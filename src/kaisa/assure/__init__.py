"""How reliable a trained network may be claimed to be, and the safety case that says so."""

from kaisa.assure.claims import Atom, Claim, Question, ask, confidence, expected_pfd, reliability
from kaisa.assure.claims_old_system import OldSystem, confidence_as_successor
from kaisa.assure.claims_planning import demands_needed, failure_free_demands, failures_borne, smallest_bound
from kaisa.assure.claims_programme import Certificate, certify, solve_programme
from kaisa.assure.exhibits import Exhibit, read_exhibit, write_exhibit
from kaisa.assure.prior import Prior

__all__ = [
    "Atom",
    "Certificate",
    "Claim",
    "Exhibit",
    "OldSystem",
    "Prior",
    "Question",
    "ask",
    "certify",
    "confidence",
    "confidence_as_successor",
    "demands_needed",
    "expected_pfd",
    "failure_free_demands",
    "failures_borne",
    "read_exhibit",
    "reliability",
    "smallest_bound",
    "solve_programme",
    "write_exhibit",
]
