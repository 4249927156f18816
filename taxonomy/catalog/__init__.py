"""Building ``catalog.sqlite`` from text, and checking that it is what the text says.

Sources are cards, vocabulary, bibliography, reference measurements, verification results, and the parameters of the
implementations, which the caller passes in: this package never imports an implementation.

Runs of users live elsewhere, see ``taxonomy.runs``; its entry points are offered here too.
"""

from taxonomy.catalog.checking import check
from taxonomy.catalog.parameters import Parameter, parameters_of
from taxonomy.catalog.publishing import publish
from taxonomy.catalog.sources import FACET_WEIGHTS, Sources
from taxonomy.catalog.writing import build, built_bytes
from taxonomy.runs import Measurement, Result, Run, RunStore, open_runs, record_run, results

__all__ = [
    "FACET_WEIGHTS",
    "Measurement",
    "Parameter",
    "Result",
    "Run",
    "RunStore",
    "Sources",
    "build",
    "built_bytes",
    "check",
    "open_runs",
    "parameters_of",
    "publish",
    "record_run",
    "results",
]
