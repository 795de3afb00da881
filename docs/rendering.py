"""Equations of pages and docstrings as MathML, which browsers draw without a script."""

from __future__ import annotations

import html
import re
from typing import Any

from griffe import Alias, Extension, Object
from latex2mathml.converter import convert

MATH = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
BAR = re.compile("<mo[^>]*>(&#x0007C;|[|])</mo>")
"""Of a norm: an operator would keep its distance from what it encloses."""
BLOCK = re.compile(
    r"^\.\. math::(?P<first>[^\n]*)\n(?P<rest>(?:[ ]+[^\n]*\n|\n(?=[ ]))*)", re.MULTILINE
)
ROLE = re.compile(r":(class|func|meth|mod|data|attr):`~?([^`]+)`", re.DOTALL)
INLINE = re.compile(r":math:`([^`]+)`", re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of every page."""

    def drawn(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        drawn = convert(html.unescape(found[2]).strip(), display=display)
        return BAR.sub('<mi mathvariant="normal">|</mi>', drawn)

    return MATH.sub(drawn, content)


def markdown(text: str) -> str:
    """A docstring whose roles and directives are those of Sphinx, as Markdown."""
    text = BLOCK.sub(
        lambda m: f"\n$$\n{' '.join((m['first'] + ' ' + m['rest']).split())}\n$$\n\n", text + "\n"
    )
    text = INLINE.sub(lambda m: f"${' '.join(m[1].split())}$", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return ROLE.sub(lambda m: f"`{m[2].split('.')[-1]}`", text).rstrip()


class Directives(Extension):
    """Reads the docstrings of the API page."""

    def on_object(self, *, obj: Object | Alias, **_: Any) -> None:
        """Called by griffe with every object, once its members are known."""
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
