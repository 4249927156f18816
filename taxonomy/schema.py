"""Tables of the catalogue, in SQLAlchemy Core.

One schema serves two kinds of file. The *built* catalogue (``catalog.sqlite``, read-only in use) is made from text
sources by ``taxonomy.catalog``. The *user's* catalogue holds runs only, and may be a PostgreSQL database. Runs name
methods by slug without a foreign key, so rebuilding or upgrading the built half can never lose one.

Natural keys (slugs, facet and term ids, digests) link the tables, so ``zoo catalog sql`` reads without look-ups;
integers serve only where full-text search needs a row id or where a million rows must stay small.

The built catalogue has a few tables more (``worked_out``): answers that take long at ten thousand methods, filled by
``taxonomy.working_out``. A user's catalogue has none of them, so nothing in it can be out of step with its runs.

Changing a table of ``metadata`` means a new revision in ``taxonomy/migrations/versions`` and a new ``REVISION`` in
``taxonomy.files``; views hold no data and are simply made anew.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.schema import CreateIndex, CreateTable

from taxonomy.files import REVISION
from taxonomy.vocabulary import FACETS, PROPERTIES

_NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
metadata = MetaData(naming_convention=_NAMING)
worked_out = MetaData(naming_convention=_NAMING)


def _slug() -> Column[str]:
    """First column of the tables that say something about one method."""
    return Column("method", String, ForeignKey("method.slug"), primary_key=True)


def _yes_no(name: str) -> Column[bool]:
    return Column(name, Boolean(create_constraint=True, name=name), nullable=False)


meta = Table(
    "meta",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", Text, nullable=False),
    comment="What the file is (kind), and the digest of the text it was built from (sources).",
)

# --- vocabulary -----------------------------------------------------------------------------------------------

facet = Table(
    "facet",
    metadata,
    Column("id", String, primary_key=True),
    Column("label", String, nullable=False),
    Column("question", Text, nullable=False),
    Column("view", String, nullable=False, comment="core, or the slug of the survey whose tree it repeats"),
    Column("position", Integer, nullable=False),
    Column(
        "weight", Float, nullable=False, comment="how much a shared term counts for the likeness of methods"
    ),
)

term = Table(
    "term",
    metadata,
    Column("facet", String, ForeignKey("facet.id"), primary_key=True),
    Column("id", String, primary_key=True),
    Column("label", String, nullable=False),
    Column("definition", Text, nullable=False),
    Column("parent", String),
    Column("position", Integer, nullable=False),
    ForeignKeyConstraint(["facet", "parent"], ["term.facet", "term.id"]),
    sqlite_with_rowid=False,
)

property_ = Table(
    "property",
    metadata,
    Column("id", String, primary_key=True),
    Column("label", String, nullable=False),
    Column("statement", Text, nullable=False),
    Column("contract", Text, nullable=False, comment="how the contract tests execute it"),
    Column("position", Integer, nullable=False),
)

# --- methods --------------------------------------------------------------------------------------------------

method = Table(
    "method",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("slug", String, nullable=False, unique=True),
    Column("name", String, nullable=False),
    Column("title", Text, nullable=False),
    Column("kind", String, nullable=False),
    Column("summary", Text, nullable=False),
    Column("year", Integer, nullable=False),
    Column("venue", String),
    Column("arxiv", JSON, nullable=False, comment="list of arXiv ids"),
    Column("authors", JSON, nullable=False, comment="list of names"),
    Column("shown_on", JSON, nullable=False, comment="list of models the authors report on"),
    Column("code", String),
    Column("code_license", String, comment="absent = the repository states none"),
    Column("bibtex", Text, nullable=False),
    Column("family", String, nullable=False, comment="the main (first) family"),
    _yes_no("implemented"),
    Column(
        "basis", String, nullable=False, comment="best source read: official-code, paper-text, abstract-only"
    ),
    Column("code_commit", String, comment="commit or release of the official code that was read"),
    # Copies of method_term and method_property: a list of ten thousand methods is read in one sweep, not joined.
    Column("facets", JSON, nullable=False, comment="term ids by facet, the main one first"),
    Column("properties", JSON, nullable=False, comment="yes or no by property; absent = does not apply"),
    Column("term_weight", Float, nullable=False, comment="sum of the facet weights of all its terms"),
    CheckConstraint("kind IN ('method', 'baseline', 'benchmark', 'survey', 'analysis')", name="kind"),
    CheckConstraint("basis IN ('official-code', 'paper-text', 'abstract-only')", name="basis"),
    CheckConstraint("year BETWEEN 1980 AND 2100", name="year"),
)
Index(None, method.c.family)
Index(None, method.c.year)

method_term = Table(
    "method_term",
    metadata,
    _slug(),
    Column("facet", String, primary_key=True),
    Column("term", String, primary_key=True),
    Column("position", Integer, nullable=False, comment="the card's order: the first term is the main one"),
    ForeignKeyConstraint(["facet", "term"], ["term.facet", "term.id"]),
    sqlite_with_rowid=False,
)
Index(None, method_term.c.facet, method_term.c.term, method_term.c.method)

method_property = Table(
    "method_property",
    metadata,
    _slug(),
    Column("property", String, ForeignKey("property.id"), primary_key=True),
    _yes_no("value"),
    sqlite_with_rowid=False,
)
Index(None, method_property.c.property, method_property.c.value, method_property.c.method)

parameter = Table(
    "parameter",
    metadata,
    _slug(),
    Column("name", String, primary_key=True),
    Column("position", Integer, nullable=False),
    Column("type", String, nullable=False, comment="readable: 'number > 0, <= 1'"),
    Column("default", Text, comment="JSON; absent when required"),
    _yes_no("required"),
    Column("description", Text, nullable=False),
    Column("schema", JSON, nullable=False, comment="JSON schema of the field"),
    sqlite_with_rowid=False,
)

claim = Table(
    "claim",
    metadata,
    _slug(),
    Column("position", Integer, primary_key=True),
    Column("model", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("metric", Text, nullable=False),
    Column("budget", Text),
    Column("value", Text, nullable=False, comment="as reported"),
    Column("value_number", Float, comment="the same as a number, where it is one"),
    Column("baseline", Text),
    Column("baseline_number", Float),
    Column("source", Text),
    Column("note", Text),
    _yes_no("verified"),
    sqlite_with_rowid=False,
)

note = Table(
    "note",
    metadata,
    _slug(),
    Column("kind", String, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("text", Text, nullable=False),
    CheckConstraint("kind IN ('note', 'paper_vs_code', 'deviation', 'reconstructed')", name="kind"),
    sqlite_with_rowid=False,
)

related = Table(
    "related",
    metadata,
    _slug(),
    Column("other", String, ForeignKey("method.slug"), primary_key=True),
    Column("position", Integer, nullable=False),
    CheckConstraint("method <> other", name="other"),
    sqlite_with_rowid=False,
)
Index(None, related.c.other)

verification = Table(
    "verification",
    metadata,
    _slug(),
    Column("kind", String, primary_key=True),
    Column("subject", String, primary_key=True, comment="a property, a facet or the name of a golden case"),
    Column("model", String, primary_key=True, comment="model it was checked on; empty for golden cases"),
    _yes_no("passed"),
    CheckConstraint("kind IN ('golden', 'property', 'facet')", name="kind"),
    Column("version", String, comment="version of the zoo that was checked"),
    Column("detail", Text),
    sqlite_with_rowid=False,
)

# --- bibliography ---------------------------------------------------------------------------------------------

paper = Table(
    "paper",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("title", Text, nullable=False),
    Column("arxiv", String, unique=True),
    Column("doi", String),
    Column("url", Text),
    Column("venue", String),
    Column("year", Integer),
    Column("code", Text),
)
Index(None, paper.c.year)

topic = Table(
    "topic",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False, unique=True),
)

paper_topic = Table(
    "paper_topic",
    metadata,
    Column("paper", Integer, ForeignKey("paper.id"), primary_key=True),
    Column("topic", Integer, ForeignKey("topic.id"), primary_key=True),
    sqlite_with_rowid=False,
)
Index(None, paper_topic.c.topic, paper_topic.c.paper)

source = Table(
    "source",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False, unique=True, comment="owner/name of the list"),
)

paper_source = Table(
    "paper_source",
    metadata,
    Column("paper", Integer, ForeignKey("paper.id"), primary_key=True),
    Column("source", Integer, ForeignKey("source.id"), primary_key=True),
    sqlite_with_rowid=False,
)

method_paper = Table(
    "method_paper",
    metadata,
    _slug(),
    Column("paper", Integer, ForeignKey("paper.id"), primary_key=True),
    sqlite_with_rowid=False,
)
Index(None, method_paper.c.paper)

# --- runs -----------------------------------------------------------------------------------------------------

model = Table(
    "model",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("ref", String, nullable=False),
    Column(
        "revision", String, nullable=False, server_default="", comment="commit or digest; empty when unknown"
    ),
    Column("facts", JSON, nullable=False, comment="parameters, architecture ..."),
    UniqueConstraint("ref", "revision"),
)

environment = Table(
    "environment",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", String, nullable=False, unique=True),
    Column("hardware", String, nullable=False),
    Column("facts", JSON, nullable=False, comment="versions, commit, threads, operating system ..."),
)

run = Table(
    "run",
    metadata,
    Column("id", Integer, primary_key=True),
    Column(
        "key", String, nullable=False, unique=True, comment="unique everywhere: merging catalogues is safe"
    ),
    Column("method", String, nullable=False, comment="the method, or a stack: a+b"),
    Column("parameters", JSON, nullable=False),
    Column(
        "config", String, nullable=False, comment="digest of method, parameters, model, inputs, seed, dtype"
    ),
    Column("trial", String, comment="runs with the same digest asked one thing different tasks"),
    Column("model", Integer, ForeignKey("model.id"), nullable=False),
    Column("environment", Integer, ForeignKey("environment.id"), nullable=False),
    Column("started", String, nullable=False, comment="UTC, ISO 8601"),
    Column("seconds", Float, nullable=False),
    Column("status", String, nullable=False),
    Column("error", Text),
    Column("seed", Integer),
    Column("dtype", String),
    Column("device", String),
    Column("protocol", String, nullable=False, comment="version of the measuring protocol"),
    Column("inputs", JSON, nullable=False, comment="what the model was fed: prompt, image, calibration ..."),
    Column("report", JSON(none_as_null=True), comment="what the method removed, as zoo.report.Report"),
    CheckConstraint("status IN ('done', 'failed', 'refused', 'interrupted')", name="status"),
)
Index(None, run.c.started, run.c.key)
Index(None, run.c.config)
Index(None, run.c.model, run.c.started, run.c.key)

run_method = Table(
    "run_method",
    metadata,
    Column("slug", String, primary_key=True),
    Column("run", Integer, ForeignKey("run.id", ondelete="CASCADE"), primary_key=True),
    comment="Each method of a stack. No foreign key to method: runs outlive cards.",
    sqlite_with_rowid=False,
)
Index(None, run_method.c.run)

measurement = Table(
    "measurement",
    metadata,
    Column("run", Integer, ForeignKey("run.id", ondelete="CASCADE"), primary_key=True),
    Column("task", String, primary_key=True, comment="data set or ability; empty when it does not apply"),
    Column("quantity", String, primary_key=True),
    Column("arm", String, primary_key=True),
    Column("unit", String, nullable=False),
    Column("median", Float, nullable=False),
    Column(
        "spread", Float, comment="half the distance between the quartiles unless the protocol says otherwise"
    ),
    Column("n", Integer, nullable=False),
    CheckConstraint("arm IN ('dense', 'method', 'ratio')", name="arm"),
    CheckConstraint("n >= 1", name="n"),
    sqlite_with_rowid=False,
)
Index(None, measurement.c.quantity, measurement.c.task, measurement.c.run)

# --- worked out by the build, in the built catalogue only ------------------------------------------------------

similar = Table(
    "similar",
    worked_out,
    Column("method", String, primary_key=True),
    Column("position", Integer, primary_key=True, comment="0 = the nearest"),
    Column("other", String, nullable=False),
    Column("score", Float, nullable=False, comment="weighted share of the terms of both, in (0, 1]"),
    comment="The methods that are most like each other.",
    sqlite_with_rowid=False,
)

term_use = Table(
    "term_use",
    worked_out,
    Column("facet", String, primary_key=True),
    Column("term", String, primary_key=True),
    Column("cards", Integer, nullable=False),
    Column("implemented", Integer, nullable=False),
    Column("methods", Text, nullable=False, comment="slugs in order, separated by spaces"),
    comment="Who has each term, or one below it.",
    sqlite_with_rowid=False,
)

topic_use = Table(
    "topic_use",
    worked_out,
    Column("topic", Integer, primary_key=True),
    Column("papers", Integer, nullable=False),
    Column("cards", Integer, nullable=False),
    Column("implemented", Integer, nullable=False),
    comment="Papers of each topic, and the cards that belong to them.",
)

model_use = Table(
    "model_use",
    worked_out,
    Column("model", Integer, primary_key=True),
    Column("runs", Integer, nullable=False),
    comment="Finished runs of each model.",
)

score = Table(
    "score",
    worked_out,
    Column("run", Integer, primary_key=True),
    Column("quantity", String, primary_key=True),
    Column("tasks", JSON, nullable=False),
    Column("parts", JSON, nullable=False, comment="the value on each task"),
    Column("value", Float, nullable=False, comment="gain (more is better), or share of the quality kept"),
    Column("noise", Float, nullable=False),
    Column("bound", Float, comment="largest gain that the saved work allows"),
    Column("dense", Float),
    Column("method", Float),
    Column("unit", String, nullable=False),
    comment="What the measurements of a run say against the unmodified model (taxonomy.scores).",
    sqlite_with_rowid=False,
)


# --- views and full-text search -------------------------------------------------------------------------------

VIEWS = ("v_method", "v_claim", "v_run", "v_measurement", "v_method_text", "v_paper", "v_paper_text")
SEARCH = ("method_fts", "paper_fts")


def _joined(dialect: str, column: str, tail: str, separator: str = ",") -> str:
    """SQL: ``column`` of the rows of ``tail`` (``FROM ... ORDER BY ...``) joined in that order."""
    if dialect == "sqlite":
        return f"(SELECT group_concat(x, '{separator}') FROM (SELECT {column} AS x {tail}))"
    return f"(SELECT string_agg(x, '{separator}') FROM (SELECT {column} AS x {tail}) AS joined)"


def _view_definitions(dialect: str) -> dict[str, str]:
    """Body of each view; column names come from the vocabulary, so a new facet is a new column."""
    facets = [
        _joined(
            dialect,
            "t.term",
            f"FROM method_term t WHERE t.method = m.slug AND t.facet = '{name}' ORDER BY t.position",
        )
        + f' AS "{name}"'
        for name in FACETS
    ]
    properties = [
        f"(SELECT p.value FROM method_property p WHERE p.method = m.slug AND p.property = '{name}') AS \"{name}\""
        for name in PROPERTIES
    ]
    topics = _joined(
        dialect,
        "o.name",
        "FROM paper_topic t JOIN topic o ON o.id = t.topic WHERE t.paper = p.id ORDER BY o.id",
    )
    cards = _joined(dialect, "c.method", "FROM method_paper c WHERE c.paper = p.id ORDER BY c.method")
    own = ["slug", "name", "title", "kind", "year", "venue", "implemented", "code", "code_license", "basis"]
    rest = ", ".join([*(f"m.{name}" for name in own), *facets, *properties, "m.summary"])
    labels = _joined(
        dialect,
        "f.label || ' ' || w.label || ' ' || w.id",
        "FROM method_term t JOIN term w ON w.facet = t.facet AND w.id = t.term JOIN facet f ON f.id = t.facet"
        " WHERE t.method = m.slug ORDER BY f.position, t.position",
        " ",
    )
    notes = _joined(dialect, "n.text", "FROM note n WHERE n.method = m.slug ORDER BY n.kind, n.position", " ")
    return {
        "v_method": f"SELECT {rest} FROM method m",
        "v_claim": "SELECT m.name, c.* FROM claim c JOIN method m ON m.slug = c.method",
        "v_run": "SELECT r.key, r.started, r.method, o.ref AS model, o.revision, e.hardware, r.device, r.dtype, r.seed,"
        " r.status, r.seconds, r.protocol, r.config, r.error"
        " FROM run r JOIN model o ON o.id = r.model JOIN environment e ON e.id = r.environment",
        "v_measurement": "SELECT r.key, r.started, r.method, o.ref AS model, e.hardware, r.device, r.dtype, r.status,"
        " x.task, x.quantity, x.arm, x.median, x.unit, x.spread, x.n"
        " FROM measurement x JOIN run r ON r.id = x.run JOIN model o ON o.id = r.model"
        " JOIN environment e ON e.id = r.environment",
        "v_method_text": f"SELECT m.id, m.slug, m.name, m.title, m.summary,"
        f" coalesce({labels}, '') || ' ' || coalesce({notes}, '') AS keywords FROM method m",
        "v_paper": f"SELECT p.id, p.title, p.arxiv, p.doi, p.url, p.venue, p.year, p.code, {topics} AS topics,"
        f" {cards} AS cards FROM paper p",
        "v_paper_text": f"SELECT p.id, p.title, p.venue, {topics} AS topics FROM paper p",
    }


def drop_views(connection: Connection) -> None:
    """Remove all views, so that the tables under them can change."""
    for name in VIEWS:
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {name}")


def create_views(connection: Connection) -> None:
    """(Re)make all views, and on SQLite the full-text tables over them (external content: no second copy)."""
    dialect = connection.dialect.name
    drop_views(connection)
    for name, body in _view_definitions(dialect).items():
        connection.exec_driver_sql(f"CREATE VIEW {name} AS {body}")
    if dialect == "sqlite":
        for name, columns in (
            ("method", "slug, name, title, summary, keywords"),
            ("paper", "title, venue, topics"),
        ):
            connection.exec_driver_sql(
                f"CREATE VIRTUAL TABLE IF NOT EXISTS {name}_fts USING fts5({columns}, content='v_{name}_text',"
                " content_rowid='id', tokenize='porter unicode61 remove_diacritics 2')"
            )


def index_text(connection: Connection) -> None:
    """On SQLite: bring the full-text tables up to date with what the views hold."""
    if connection.dialect.name == "sqlite":
        for name in SEARCH:
            for command in ("rebuild", "optimize"):
                connection.exec_driver_sql(f"INSERT INTO {name}({name}) VALUES ('{command}')")


def create_all(connection: Connection) -> None:
    """Make an empty catalogue at ``REVISION``. The same as running all migrations, without importing Alembic."""
    create_tables(connection, metadata)
    connection.exec_driver_sql(
        "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL,"
        " CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
    )
    connection.execute(text("INSERT INTO alembic_version VALUES (:revision)"), {"revision": REVISION})
    create_views(connection)


def create_tables(connection: Connection, which: MetaData) -> None:
    """Make the tables of ``which`` with their indexes, always in the same order."""
    # Not which.create_all: its order changes from process to process, and so would the bytes of the file.
    for table in which.tables.values():
        connection.execute(CreateTable(table))
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            connection.execute(CreateIndex(index))
