"""Where the files of the taxonomy are, in a checkout and in an installed wheel, and where a user's runs go.

In a checkout the catalogue and the site's sources lie at the top of the repository, where people look for them;
a wheel carries them as ``taxonomy/_data/...`` (see ``pyproject.toml``). Cards, bibliography and measurements are in
the package either way.
"""

from __future__ import annotations

import os
from pathlib import Path

from taxonomy.errors import CatalogError

PACKAGE = Path(__file__).resolve().parent
CARDS = PACKAGE / "cards"
BIBLIOGRAPHY = PACKAGE / "bibliography.jsonl"
MEASUREMENTS = PACKAGE / "measurements"
VERIFICATION = PACKAGE / "verification"
MIGRATIONS = PACKAGE / "migrations"

SETTING = "ZOO_CATALOG"
"""Environment variable: file or SQLAlchemy URL of the catalogue that holds the user's runs."""


def _shipped(relative: str) -> Path:
    """``relative`` in the wheel's data folder if that is there, else at the top of the checkout."""
    packaged = PACKAGE / "_data" / relative
    return packaged if packaged.exists() else PACKAGE.parent / relative


def catalog_file() -> Path:
    """The built catalogue: cards, papers, reference measurements. It may not exist yet."""
    return _shipped("catalog.sqlite")


def templates() -> Path:
    """Folder of the site's templates."""
    return _shipped("site/templates")


def assets() -> Path:
    """Folder of the site's style sheets, scripts and icons."""
    return _shipped("site/assets")


def user_catalog() -> str:
    """Where the user's runs are kept: a file path, or a SQLAlchemy URL (recognised by ``://``).

    ``ZOO_CATALOG`` decides; without it the platform's folder for user data does.

    Raises:
        CatalogError: the setting names a folder.
    """
    setting = os.environ.get(SETTING, "").strip()
    if not setting:
        from platformdirs import user_data_path

        return str(user_data_path("efficiency-zoo", appauthor=False) / "catalog.sqlite")
    setting = setting.removeprefix("sqlite:///")  # the URL of a file is that file
    if "://" in setting:
        return setting
    path = Path(setting).expanduser()
    if path.is_dir():
        raise CatalogError(f"{SETTING} is a folder ({path}); name a file in it, or a SQLAlchemy URL")
    return str(path.absolute())
