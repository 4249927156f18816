"""Runs know which others asked the same method other tasks."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; runs from before stand alone."""
    op.add_column(
        "run",
        sa.Column(
            "trial",
            sa.String(),
            nullable=True,
            comment="runs with the same digest asked one thing different tasks",
        ),
    )
