"""tools/kernel_page.py as a module, and the sections of the page that it writes."""

from __future__ import annotations

import importlib.util
import re

from launching import ROOT

PAGE = ROOT / "docs/kernels.md"


def tool():
    """The module; tools/ is no package."""
    spec = importlib.util.spec_from_file_location("kernel_page_tool", ROOT / "tools/kernel_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(name):
    """The lines of a section of the page."""
    text = PAGE.read_text(encoding="utf-8")
    return re.search(rf"<!-- {name} -->\n\n(.*?)\n\n<!-- end -->", text, re.DOTALL)[1].split("\n")
