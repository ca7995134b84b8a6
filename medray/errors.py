"""The one exception tree.

    MedrayError                 anything medray raises on purpose; the command line prints it without a traceback
    ├── ConfigError             a key, value or override that the schema refuses
    ├── DataError               a file, layout or manifest that can't be used
    │   ├── UnreadableError     one file could not be decoded; names the file and the cause
    │   ├── LeakError           the same patient or image stands on two sides of a split
    │   └── DownloadError       a named data set could not be fetched or its hash is wrong
    ├── ModelError              an unknown model, or one that can't do what is asked (task, dimensions, shape)
    ├── TrainingError           a training run that can't go on
    │   ├── NonFiniteLossError  the loss became NaN or infinite; names step and cause
    │   └── OutOfMemoryError    it does not fit, even with a micro-batch of one
    ├── StudyError              a study that can't start, resume or finish
    ├── StorageError            a store of runs that can't be read or written, or holds another state than the folder
    ├── BundleError             a bundle that is missing, altered, or doesn't reproduce its golden outputs
    ├── CompressionError        a bundle that can't be quantised, pruned or distilled as asked
    ├── ServingError            a server that can't start, or a request that it refuses
    ├── PrivacyError            training that would not be private as claimed, or a budget that would be overspent
    ├── FederationError         a federation, a site or a run between them that can't start or go on
    │   └── PolicyError         a site's own rules refuse what it was asked for
    │       └── WithheldError   and why exactly stays at the site
    └── MissingDependencyError  an optional library is absent; names the command that installs it

A message states the value, the rule and the fix.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "CompressionError",
    "ConfigError",
    "DataError",
    "DownloadError",
    "FederationError",
    "LeakError",
    "MedrayError",
    "MissingDependencyError",
    "ModelError",
    "NonFiniteLossError",
    "OutOfMemoryError",
    "PolicyError",
    "PrivacyError",
    "ServingError",
    "StorageError",
    "StudyError",
    "TrainingError",
    "UnreadableError",
    "WithheldError",
]


class MedrayError(Exception):
    """Base of every error that medray raises on purpose."""


class ConfigError(MedrayError):
    """A key, value or override that the schema refuses."""


class DataError(MedrayError):
    """A file, layout or manifest that can't be used."""


class UnreadableError(DataError):
    """One file could not be decoded.

    Args:
        path: the file (or ``archive#member`` reference).
        cause: what is wrong with it, in one sentence.
    """

    def __init__(self, path: object, cause: str) -> None:
        super().__init__(f"{path}: {cause}")
        self.path = str(path)
        self.cause = cause

    def __reduce__(self) -> tuple[type[UnreadableError], tuple[str, str]]:
        return type(self), (self.path, self.cause)


class LeakError(DataError):
    """The same patient or image stands on two sides of a split."""


class DownloadError(DataError):
    """A named data set could not be fetched, or its hash is wrong."""


class ModelError(MedrayError):
    """An unknown model, or one that can't do what is asked of it."""


class TrainingError(MedrayError):
    """A training run that can't go on."""


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite."""


class OutOfMemoryError(TrainingError):
    """The model does not fit.

    Attributes:
        micro_batch: samples at once that may fit; None where not even one does.
    """

    micro_batch: int | None = None


class StudyError(MedrayError):
    """A study that can't start, resume or finish."""


class StorageError(MedrayError):
    """A store of runs that can't be read or written, or that holds another state than the run's folder."""


class BundleError(MedrayError):
    """A bundle that is missing, altered, or doesn't reproduce its golden outputs."""


class CompressionError(MedrayError):
    """A bundle that can't be quantised, pruned or distilled as asked."""


class ServingError(MedrayError):
    """A server that can't start, or a request that it refuses."""


class PrivacyError(MedrayError):
    """Training that would not be private as claimed, or a budget that would be overspent."""


class FederationError(MedrayError):
    """A federation, a site or a run between them that can't start or go on."""


class PolicyError(FederationError):
    """A site's own rules refuse what it was asked for."""


class WithheldError(PolicyError):
    """A refusal whose exact reason stays at the site, since it tells of its cases.

    Args:
        message: what the server may read.
        exactly: for the site's own log.
    """

    def __init__(self, message: str, exactly: str) -> None:
        super().__init__(message)
        self.exactly = exactly


class MissingDependencyError(MedrayError):
    """An optional library is absent.

    Args:
        library: its import name.
        why: what needs it.
        install: the command that installs it.
    """

    def __init__(self, library: str, why: str, install: str) -> None:
        super().__init__(f"{why} needs '{library}', which is not installed. Install it with: {install}")
        self.library, self.why, self.install = library, why, install

    def __reduce__(self) -> tuple[type[MissingDependencyError], tuple[str, str, str]]:
        return type(self), (self.library, self.why, self.install)
