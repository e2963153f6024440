"""What the site's Markdown has beside the standard extensions: equations, rendered to MathML when the site is built.

They are written as on GitHub, between $` and `$, or as a fenced block named `math`. Browsers draw MathML themselves,
so the pages need no script and no font.
"""

import re
from typing import Any
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from math_core import LatexToMathML

LATEX = LatexToMathML()


class InlineEquation(InlineProcessor):
    def handleMatch(self, match: re.Match[str], data: str) -> tuple[Element | str, int, int]:
        equation = LATEX.convert_with_local_state(match[1], displaystyle=False)
        return self.md.htmlStash.store(equation), *match.span()


def block_equation(source: str, *_: Any, **__: Any) -> str:
    """The formatter of fenced blocks named `math`."""
    return f'<div class="equation">{LATEX.convert_with_local_state(source, displaystyle=True)}</div>'


class Equations(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(InlineEquation(r"\$`(.+?)`\$", md), "equation", 195)  # before code, 190


def makeExtension(**settings: Any) -> Equations:
    return Equations(**settings)
