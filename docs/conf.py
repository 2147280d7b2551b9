"""How the documentation is built: sphinx, furo, myst; no network, no LaTeX, equations as text."""

from __future__ import annotations

import sys
from pathlib import Path

import dropkit
from dropkit.bench.peers import name_torchvision_operators

name_torchvision_operators()  # torchmetrics imports it, and it cannot be beside a CPU build of torch
sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "dropkit"
author = "The dropkit maintainers"
copyright = "The dropkit maintainers, Apache-2.0"
version = release = dropkit.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "plain_docstrings",  # before napoleon: it has to see our docstrings first
    "sphinx.ext.napoleon",
    "command_help",
    "claims_list",
]
exclude_patterns = ["_build", "extensions"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
default_role = "code"
# Words before a colon in a property's line are taken for types, and "mean" or "members" has several targets then.
suppress_warnings = ["ref.python"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Source", "returns_style")]

smartquotes = False
html_theme = "furo"
html_title = f"dropkit {version}"
html_copy_source = False
html_extra_path = ["extra"]  # copied as they are: the report of the claims
html_show_sourcelink = False
