"""The errors that a user can cause, each a ``ValueError`` with a message that names the way out.

Every message says four things: what was expected, what came, where (the item's name), and what to do.
The command line prints it as one line and exits with 2; a traceback means a defect of ours.
"""

from __future__ import annotations


class SpeechLMError(ValueError):
    """Base of all errors that bad input causes."""


class ConfigError(SpeechLMError):
    """A setting is impossible or contradicts another."""


class AudioError(SpeechLMError):
    """An audio file or array is missing, unreadable, empty, not finite, or of another rate."""


class ManifestError(SpeechLMError):
    """A manifest line is not valid: bad JSON, not UTF-8, a duplicate id, a missing field or file."""


class TokenizerError(SpeechLMError):
    """A tokenizer cannot be fitted, loaded, or applied to what it was given."""


class KMeansError(SpeechLMError):
    """K-Means cannot be fitted, loaded, or applied to what it was given."""


class LayoutError(SpeechLMError):
    """A token layout contradicts itself or does not have what is asked of it."""


class LayoutMismatchError(LayoutError):
    """Two token layouts that must be equal are not; the message names the first difference."""


class ShardError(SpeechLMError):
    """A token folder is incomplete, truncated, or was written by something else."""


class PlanError(SpeechLMError):
    """A pack plan is impossible, e.g. a sample longer than the budget."""


class CheckpointError(SpeechLMError):
    """A checkpoint or model folder is missing, incomplete, or belongs to another run."""


class GenerationError(SpeechLMError):
    """A generation request cannot be served: unknown task, prompt too long, bad sampling settings."""


class StorageError(SpeechLMError):
    """A file could not be written: the disk is full or the folder is not writable."""
