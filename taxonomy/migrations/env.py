"""Run migrations on the connection that ``taxonomy.runs.upgrade`` passes in: its transaction is the caller's."""

from alembic import context

from taxonomy.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
