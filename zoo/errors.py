"""Errors of the running half. Each is one sentence: what was given, what is accepted, what to try next."""

from __future__ import annotations


class ZooError(Exception):
    """Base of everything the zoo raises on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 1


class BadInput(ZooError):
    """The user asked for something that cannot be: a wrong value, file or combination."""

    exit_code = 2


class UnknownMethod(BadInput):
    """No implementation has this name."""


class BadParameter(BadInput):
    """A method parameter is unknown or out of range."""


class Refused(BadInput):
    """The method cannot work on this model: it says what it needs and what the model has."""


class ModelNotFound(BadInput):
    """A model reference leads nowhere."""


class NeedsExtra(BadInput):
    """An optional package is missing; the message says which to install."""


class DownloadFailed(ZooError):
    """Weights could not be fetched, or their digest is wrong."""


class RunFailed(ZooError):
    """The work itself failed (NaN activations, a full disk ...)."""
