"""Alembic migrations of the user's catalogue. A new revision: copy the newest file in ``versions``, count up, and
raise ``taxonomy.files.REVISION``; a test compares the migrated schema with ``taxonomy.schema``.
"""
