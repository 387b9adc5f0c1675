"""A hook of mkdocs: links to example files lead to the pages that `make docs` renders from them."""

from __future__ import annotations

import re
from typing import Any

NOTEBOOK = "fastai_notebook"  # the page of fastai_lm.ipynb, as fastai_lm.md is the page of the script


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the text of a page with its links to examples replaced."""
    markdown = re.sub(r"(\]\((?:\.\./)?examples/)\w+\.ipynb\)", rf"\g<1>{NOTEBOOK}.md)", markdown)
    return re.sub(r"(\]\((?:\.\./)?examples/\w+)\.py\)", r"\1.md)", markdown)
