"""The manual: `make docs`."""

import adamite

project = "adamite"
version = release = adamite.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
suppress_warnings = ["myst.xref_missing"]  # links to source files lead out of the manual
exclude_patterns = ["_build"]
default_role = "code"
html_theme = "furo"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
