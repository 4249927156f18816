from catalog_fixtures import as_catalog, built
from postgres_server import database, postgres_server

__all__ = ["as_catalog", "built", "database", "postgres_server"]
