"""Hooks of mkdocs: pages that the site renders from code, where the repository has files and signatures.

Links to example files lead to the pages that `make docs` renders from them, and docs/api.md shows whole docstrings.
"""

from __future__ import annotations

import re
from typing import Any

NOTEBOOK = "fastai_notebook"  # the page of fastai_lm.ipynb, as fastai_lm.md is the page of the script


def documented(match: re.Match[str]) -> str:
    """Return the directive that shows the docstrings of a name, and of the methods whose signatures the page has."""
    name, block = match.groups()
    members = [method for method in re.findall(r"^ {4}def (\w+)", block, re.MULTILINE) if method != "__init__"]
    return f"::: {name}\n    options:\n      members: {members or 'false'}\n"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the text of a page with its links to examples and its signatures replaced."""
    markdown = re.sub(r"(\]\((?:\.\./)?examples/)\w+\.ipynb\)", rf"\g<1>{NOTEBOOK}.md)", markdown)
    markdown = re.sub(r"(\]\((?:\.\./)?examples/\w+)\.py\)", r"\1.md)", markdown)
    return re.sub(r"^### `(fastreg[\w.]+)`\n\n```py\n(.*?)^```\n", documented, markdown, flags=re.MULTILINE | re.DOTALL)
