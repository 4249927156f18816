from catalog_fixtures import as_catalog, built

__all__ = ["as_catalog", "built"]
