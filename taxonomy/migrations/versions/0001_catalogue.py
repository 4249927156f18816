"""The first schema of the catalogue: vocabulary, methods, bibliography, runs."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "environment",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("hardware", sa.String(), nullable=False),
        sa.Column(
            "facts", sa.JSON(), nullable=False, comment="versions, commit, threads, operating system ..."
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_environment")),
        sa.UniqueConstraint("digest", name=op.f("uq_environment_digest")),
    )
    op.create_table(
        "facet",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("label", sa.String(), nullable=False),
        sa.Column("question", sa.Text(), nullable=False),
        sa.Column(
            "view",
            sa.String(),
            nullable=False,
            comment="core, or the slug of the survey whose tree it repeats",
        ),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column(
            "weight",
            sa.Float(),
            nullable=False,
            comment="how much a shared term counts for the likeness of methods",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_facet")),
    )
    op.create_table(
        "meta",
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_meta")),
        comment="What the file is (kind), and the digest of the text it was built from (sources).",
    )
    op.create_table(
        "method",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("slug", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("summary", sa.Text(), nullable=False),
        sa.Column("year", sa.Integer(), nullable=False),
        sa.Column("venue", sa.String(), nullable=True),
        sa.Column("arxiv", sa.JSON(), nullable=False, comment="list of arXiv ids"),
        sa.Column("authors", sa.JSON(), nullable=False, comment="list of names"),
        sa.Column("shown_on", sa.JSON(), nullable=False, comment="list of models the authors report on"),
        sa.Column("code", sa.String(), nullable=True),
        sa.Column("code_license", sa.String(), nullable=True, comment="absent = the repository states none"),
        sa.Column("bibtex", sa.Text(), nullable=False),
        sa.Column("family", sa.String(), nullable=False, comment="the main (first) family"),
        sa.Column("implemented", sa.Boolean(create_constraint=True, name="implemented"), nullable=False),
        sa.Column(
            "basis",
            sa.String(),
            nullable=False,
            comment="best source read: official-code, paper-text, abstract-only",
        ),
        sa.Column(
            "code_commit",
            sa.String(),
            nullable=True,
            comment="commit or release of the official code that was read",
        ),
        sa.Column("facets", sa.JSON(), nullable=False, comment="term ids by facet, the main one first"),
        sa.Column(
            "properties", sa.JSON(), nullable=False, comment="yes or no by property; absent = does not apply"
        ),
        sa.Column(
            "term_weight", sa.Float(), nullable=False, comment="sum of the facet weights of all its terms"
        ),
        sa.CheckConstraint(
            "basis IN ('official-code', 'paper-text', 'abstract-only')", name=op.f("ck_method_basis")
        ),
        sa.CheckConstraint(
            "kind IN ('method', 'baseline', 'benchmark', 'survey', 'analysis')", name=op.f("ck_method_kind")
        ),
        sa.CheckConstraint("year BETWEEN 1980 AND 2100", name=op.f("ck_method_year")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_method")),
        sa.UniqueConstraint("slug", name=op.f("uq_method_slug")),
    )
    op.create_index(op.f("ix_method_family"), "method", ["family"], unique=False)
    op.create_index(op.f("ix_method_year"), "method", ["year"], unique=False)
    op.create_table(
        "model",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("ref", sa.String(), nullable=False),
        sa.Column(
            "revision",
            sa.String(),
            server_default="",
            nullable=False,
            comment="commit or digest; empty when unknown",
        ),
        sa.Column("facts", sa.JSON(), nullable=False, comment="parameters, architecture ..."),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model")),
        sa.UniqueConstraint("ref", "revision", name=op.f("uq_model_ref_revision")),
    )
    op.create_table(
        "paper",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("arxiv", sa.String(), nullable=True),
        sa.Column("doi", sa.String(), nullable=True),
        sa.Column("url", sa.Text(), nullable=True),
        sa.Column("venue", sa.String(), nullable=True),
        sa.Column("year", sa.Integer(), nullable=True),
        sa.Column("code", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_paper")),
        sa.UniqueConstraint("arxiv", name=op.f("uq_paper_arxiv")),
    )
    op.create_index(op.f("ix_paper_year"), "paper", ["year"], unique=False)
    op.create_table(
        "property",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("label", sa.String(), nullable=False),
        sa.Column("statement", sa.Text(), nullable=False),
        sa.Column("contract", sa.Text(), nullable=False, comment="how the contract tests execute it"),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_property")),
    )
    op.create_table(
        "source",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False, comment="owner/name of the list"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_source")),
        sa.UniqueConstraint("name", name=op.f("uq_source_name")),
    )
    op.create_table(
        "topic",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_topic")),
        sa.UniqueConstraint("name", name=op.f("uq_topic_name")),
    )
    op.create_table(
        "claim",
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("budget", sa.Text(), nullable=True),
        sa.Column("value", sa.Text(), nullable=False, comment="as reported"),
        sa.Column("value_number", sa.Float(), nullable=True, comment="the same as a number, where it is one"),
        sa.Column("baseline", sa.Text(), nullable=True),
        sa.Column("baseline_number", sa.Float(), nullable=True),
        sa.Column("source", sa.Text(), nullable=True),
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("verified", sa.Boolean(create_constraint=True, name="verified"), nullable=False),
        sa.ForeignKeyConstraint(["method"], ["method.slug"], name=op.f("fk_claim_method")),
        sa.PrimaryKeyConstraint("method", "position", name=op.f("pk_claim")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "method_paper",
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("paper", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["method"], ["method.slug"], name=op.f("fk_method_paper_method")),
        sa.ForeignKeyConstraint(["paper"], ["paper.id"], name=op.f("fk_method_paper_paper")),
        sa.PrimaryKeyConstraint("method", "paper", name=op.f("pk_method_paper")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_method_paper_paper"), "method_paper", ["paper"], unique=False)
    op.create_table(
        "method_property",
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("property", sa.String(), nullable=False),
        sa.Column("value", sa.Boolean(create_constraint=True, name="value"), nullable=False),
        sa.ForeignKeyConstraint(["method"], ["method.slug"], name=op.f("fk_method_property_method")),
        sa.ForeignKeyConstraint(["property"], ["property.id"], name=op.f("fk_method_property_property")),
        sa.PrimaryKeyConstraint("method", "property", name=op.f("pk_method_property")),
        sqlite_with_rowid=False,
    )
    op.create_index(
        op.f("ix_method_property_property_value_method"),
        "method_property",
        ["property", "value", "method"],
        unique=False,
    )
    op.create_table(
        "note",
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "kind IN ('note', 'paper_vs_code', 'deviation', 'reconstructed')", name=op.f("ck_note_kind")
        ),
        sa.ForeignKeyConstraint(["method"], ["method.slug"], name=op.f("fk_note_method")),
        sa.PrimaryKeyConstraint("method", "kind", "position", name=op.f("pk_note")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "paper_source",
        sa.Column("paper", sa.Integer(), nullable=False),
        sa.Column("source", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["paper"], ["paper.id"], name=op.f("fk_paper_source_paper")),
        sa.ForeignKeyConstraint(["source"], ["source.id"], name=op.f("fk_paper_source_source")),
        sa.PrimaryKeyConstraint("paper", "source", name=op.f("pk_paper_source")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "paper_topic",
        sa.Column("paper", sa.Integer(), nullable=False),
        sa.Column("topic", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["paper"], ["paper.id"], name=op.f("fk_paper_topic_paper")),
        sa.ForeignKeyConstraint(["topic"], ["topic.id"], name=op.f("fk_paper_topic_topic")),
        sa.PrimaryKeyConstraint("paper", "topic", name=op.f("pk_paper_topic")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_paper_topic_topic_paper"), "paper_topic", ["topic", "paper"], unique=False)
    op.create_table(
        "parameter",
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("type", sa.String(), nullable=False, comment="readable: 'number > 0, <= 1'"),
        sa.Column("default", sa.Text(), nullable=True, comment="JSON; absent when required"),
        sa.Column("required", sa.Boolean(create_constraint=True, name="required"), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("schema", sa.JSON(), nullable=False, comment="JSON schema of the field"),
        sa.ForeignKeyConstraint(["method"], ["method.slug"], name=op.f("fk_parameter_method")),
        sa.PrimaryKeyConstraint("method", "name", name=op.f("pk_parameter")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "related",
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("other", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.CheckConstraint("method <> other", name=op.f("ck_related_other")),
        sa.ForeignKeyConstraint(["method"], ["method.slug"], name=op.f("fk_related_method")),
        sa.ForeignKeyConstraint(["other"], ["method.slug"], name=op.f("fk_related_other")),
        sa.PrimaryKeyConstraint("method", "other", name=op.f("pk_related")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_related_other"), "related", ["other"], unique=False)
    op.create_table(
        "run",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column(
            "key", sa.String(), nullable=False, comment="unique everywhere: merging catalogues is safe"
        ),
        sa.Column("method", sa.String(), nullable=False, comment="the method, or a stack: a+b"),
        sa.Column("parameters", sa.JSON(), nullable=False),
        sa.Column(
            "config",
            sa.String(),
            nullable=False,
            comment="digest of method, parameters, model, inputs, seed, dtype",
        ),
        sa.Column("model", sa.Integer(), nullable=False),
        sa.Column("environment", sa.Integer(), nullable=False),
        sa.Column("started", sa.String(), nullable=False, comment="UTC, ISO 8601"),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("seed", sa.Integer(), nullable=True),
        sa.Column("dtype", sa.String(), nullable=True),
        sa.Column("device", sa.String(), nullable=True),
        sa.Column("protocol", sa.String(), nullable=False, comment="version of the measuring protocol"),
        sa.Column(
            "inputs",
            sa.JSON(),
            nullable=False,
            comment="what the model was fed: prompt, image, calibration ...",
        ),
        sa.Column(
            "report",
            sa.JSON(none_as_null=True),
            nullable=True,
            comment="what the method removed, as zoo.report.Report",
        ),
        sa.CheckConstraint(
            "status IN ('done', 'failed', 'refused', 'interrupted')", name=op.f("ck_run_status")
        ),
        sa.ForeignKeyConstraint(["environment"], ["environment.id"], name=op.f("fk_run_environment")),
        sa.ForeignKeyConstraint(["model"], ["model.id"], name=op.f("fk_run_model")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run")),
        sa.UniqueConstraint("key", name=op.f("uq_run_key")),
    )
    op.create_index(op.f("ix_run_config"), "run", ["config"], unique=False)
    op.create_index(op.f("ix_run_model_started_key"), "run", ["model", "started", "key"], unique=False)
    op.create_index(op.f("ix_run_started_key"), "run", ["started", "key"], unique=False)
    op.create_table(
        "term",
        sa.Column("facet", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("label", sa.String(), nullable=False),
        sa.Column("definition", sa.Text(), nullable=False),
        sa.Column("parent", sa.String(), nullable=True),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["facet", "parent"], ["term.facet", "term.id"], name=op.f("fk_term_facet_parent")
        ),
        sa.ForeignKeyConstraint(["facet"], ["facet.id"], name=op.f("fk_term_facet")),
        sa.PrimaryKeyConstraint("facet", "id", name=op.f("pk_term")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "verification",
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column(
            "subject", sa.String(), nullable=False, comment="a property, a facet or the name of a golden case"
        ),
        sa.Column(
            "model", sa.String(), nullable=False, comment="model it was checked on; empty for golden cases"
        ),
        sa.Column("passed", sa.Boolean(create_constraint=True, name="passed"), nullable=False),
        sa.Column("version", sa.String(), nullable=True, comment="version of the zoo that was checked"),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.CheckConstraint("kind IN ('golden', 'property', 'facet')", name=op.f("ck_verification_kind")),
        sa.ForeignKeyConstraint(["method"], ["method.slug"], name=op.f("fk_verification_method")),
        sa.PrimaryKeyConstraint("method", "kind", "subject", "model", name=op.f("pk_verification")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "measurement",
        sa.Column("run", sa.Integer(), nullable=False),
        sa.Column(
            "task", sa.String(), nullable=False, comment="data set or ability; empty when it does not apply"
        ),
        sa.Column("quantity", sa.String(), nullable=False),
        sa.Column("arm", sa.String(), nullable=False),
        sa.Column("unit", sa.String(), nullable=False),
        sa.Column("median", sa.Float(), nullable=False),
        sa.Column(
            "spread",
            sa.Float(),
            nullable=True,
            comment="half the distance between the quartiles unless the protocol says otherwise",
        ),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.CheckConstraint("arm IN ('dense', 'method', 'ratio')", name=op.f("ck_measurement_arm")),
        sa.CheckConstraint("n >= 1", name=op.f("ck_measurement_n")),
        sa.ForeignKeyConstraint(["run"], ["run.id"], name=op.f("fk_measurement_run"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run", "task", "quantity", "arm", name=op.f("pk_measurement")),
        sqlite_with_rowid=False,
    )
    op.create_index(
        op.f("ix_measurement_quantity_task_run"), "measurement", ["quantity", "task", "run"], unique=False
    )
    op.create_table(
        "method_term",
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("facet", sa.String(), nullable=False),
        sa.Column("term", sa.String(), nullable=False),
        sa.Column(
            "position",
            sa.Integer(),
            nullable=False,
            comment="the card's order: the first term is the main one",
        ),
        sa.ForeignKeyConstraint(
            ["facet", "term"], ["term.facet", "term.id"], name=op.f("fk_method_term_facet_term")
        ),
        sa.ForeignKeyConstraint(["method"], ["method.slug"], name=op.f("fk_method_term_method")),
        sa.PrimaryKeyConstraint("method", "facet", "term", name=op.f("pk_method_term")),
        sqlite_with_rowid=False,
    )
    op.create_index(
        op.f("ix_method_term_facet_term_method"), "method_term", ["facet", "term", "method"], unique=False
    )
    op.create_table(
        "run_method",
        sa.Column("slug", sa.String(), nullable=False),
        sa.Column("run", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["run.id"], name=op.f("fk_run_method_run"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("slug", "run", name=op.f("pk_run_method")),
        comment="Each method of a stack. No foreign key to method: runs outlive cards.",
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_run_method_run"), "run_method", ["run"], unique=False)
