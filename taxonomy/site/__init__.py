"""The static site, rendered from the catalogue: plain files that work from a folder, a server or an archive.

``build`` loads the catalogue once (``loading``), renders every page (``pages``) and hands the files to ``output``.
Nothing depends on the clock or the machine, so the same catalogue gives the same bytes. No page asks anything of
another server.
"""

from taxonomy.site.output import Published, SiteError, publish
from taxonomy.site.pages import EXAMPLE, build, default_folder, render
from taxonomy.site.text import FILTERS

__all__ = ["EXAMPLE", "FILTERS", "Published", "SiteError", "build", "default_folder", "publish", "render"]
