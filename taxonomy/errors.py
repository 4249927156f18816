"""Errors of the knowledge half. Each is one sentence that says what to do; the CLI prints it and exits with 2."""

from __future__ import annotations


class TaxonomyError(Exception):
    """Base of everything the taxonomy raises on bad input."""


class CardError(TaxonomyError):
    """A card file does not say what a card must say."""


class CatalogError(TaxonomyError):
    """The catalogue cannot be opened, built or written."""


class EmptyCatalogError(CatalogError):
    """The file has no table yet: another process is about to fill it."""


class QueryError(TaxonomyError):
    """A query names a facet, term, property or slug that does not exist."""
