"""The errors that a caller may want to catch.

Every message says what was found, what was expected and what to do. Those that speak of a bad value
are `ValueError`s too, those that speak of a failed computation `RuntimeError`s, so that code that
does not know this library still catches them.
"""


class KaisaError(Exception):
    """Whatever this library refuses or fails to do."""


class ConfigurationError(KaisaError, ValueError):
    """An option has a value that cannot work."""


class DataError(KaisaError, ValueError):
    """Training data is missing, empty or unreadable."""


class DecompositionError(KaisaError, RuntimeError):
    """The factors of a layer could not be decomposed, several times in a row."""


class DifferentiationError(KaisaError, RuntimeError):
    """An operation has no second derivative, which the Hessian needs."""


class StateError(KaisaError, ValueError):
    """A saved state does not belong to the object that should load it."""


class CollectiveError(KaisaError, RuntimeError):
    """Ranks could not exchange what they had to: one has failed, is late, or was built differently."""


class CheckpointError(StateError):
    """A checkpoint is torn, foreign, or could not be written; what was there before is as it was."""
