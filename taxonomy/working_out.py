"""What the build works out once, so that no reading command and no page has to: see ``schema.worked_out``.

Everything here follows from the tables that are filled already; ``score`` is filled along with the runs, by
``taxonomy.catalog``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy import Connection

from taxonomy import schema
from taxonomy.vocabulary import FACETS

SIMILAR = 5
"""Most similar methods kept per method."""

_PAIRS_AT_ONCE = 4_000_000
"""How many pairs of methods are compared in one go: it bounds the memory."""


def work_out(connection: Connection) -> None:
    """Fill all tables but ``score`` of a catalogue that is otherwise complete."""
    holders: dict[tuple[str, str], list[str]] = defaultdict(list)
    named = sa.select(schema.method_term).order_by(schema.method_term.c.method)
    for row in connection.execute(named):
        holders[row.facet, row.term].append(row.method)
    for table, rows in (
        (schema.term_use, _term_use(connection, holders)),
        (schema.similar, _similar(connection, holders)),
    ):
        made = list(rows)
        if made:
            connection.execute(table.insert(), made)
    connection.exec_driver_sql(
        "INSERT INTO model_use SELECT o.id, count(r.id) FROM model o LEFT JOIN run r"
        " ON r.model = o.id AND r.status = 'done' GROUP BY o.id"
    )
    connection.exec_driver_sql(
        """INSERT INTO topic_use
        SELECT t.topic, count(DISTINCT t.paper), count(DISTINCT l.method),
               count(DISTINCT CASE WHEN m.implemented THEN m.slug END)
        FROM paper_topic t LEFT JOIN method_paper l ON l.paper = t.paper LEFT JOIN method m ON m.slug = l.method
        GROUP BY t.topic"""
    )


def _term_use(connection: Connection, holders: dict[tuple[str, str], list[str]]) -> Iterator[dict[str, Any]]:
    method = schema.method
    running = set(connection.execute(sa.select(method.c.slug).where(method.c.implemented)).scalars())
    for facet in FACETS.values():
        found: dict[str, set[str]] = {}
        for term in reversed(facet.terms):  # children stand behind their parents
            methods = found.setdefault(term.id, set())
            methods.update(holders.get((facet.id, term.id), ()))
            if term.parent is not None:
                found.setdefault(term.parent, set()).update(methods)
        for term in facet.terms:
            yield {
                "facet": facet.id,
                "term": term.id,
                "cards": len(found[term.id]),
                "implemented": len(found[term.id] & running),
                "methods": " ".join(sorted(found[term.id])),
            }


def _similar(connection: Connection, holders: dict[tuple[str, str], list[str]]) -> Iterator[dict[str, Any]]:
    """For each method the nearest others: the weighted Jaccard index over terms, ties by slug.

    The weight of a term is that of its facet: shared over all terms of either. All pairs come out of one matrix
    product, in blocks. Weights are multiples of 1/2, so the sums are exact in single precision, and equal scores
    are equal to the bit; they stay in the order of slugs.
    """
    slugs = list(connection.execute(sa.select(schema.method.c.slug).order_by(schema.method.c.slug)).scalars())
    if len(slugs) < 2:
        return
    weights = {row.id: row.weight for row in connection.execute(sa.select(schema.facet))}
    place = {slug: row for row, slug in enumerate(slugs)}
    named = np.zeros((len(slugs), len(holders)), np.float32)
    for column, methods in enumerate(holders.values()):
        named[[place[slug] for slug in methods], column] = 1.0
    weighted = named * np.array([weights[facet] for facet, _ in holders], np.float32)
    totals = weighted.sum(axis=1)
    keep = min(SIMILAR, len(slugs) - 1)
    block = max(1, _PAIRS_AT_ONCE // len(slugs))
    for start in range(0, len(slugs), block):
        shared = weighted[start : start + block] @ named.T
        union = totals[start : start + block, None] + totals - shared
        scores = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
        own = np.arange(len(shared))
        scores[own, start + own] = -1.0
        least = np.partition(scores, len(slugs) - keep, axis=1)[:, len(slugs) - keep]
        for row, line in enumerate(scores):
            alike = np.flatnonzero(line >= max(least[row], 1e-9))
            nearest = alike[np.argsort(-line[alike], kind="stable")][:keep].tolist()
            one = start + row
            for position, other in enumerate(nearest):
                score = float(shared[row, other]) / float(union[row, other])
                yield {"method": slugs[one], "position": position, "other": slugs[other], "score": score}
