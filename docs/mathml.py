"""Formulas as MathML, which browsers render themselves: the site needs no script and no network."""

import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.errors import SphinxError

# What latex2mathml does not know, in other words.
_WORDS = {r"\arg": r"\operatorname{arg}", r"\lceil": "⌈", r"\rceil": "⌉"}


def mathml(tex: str, display: str) -> str:
    """The MathML of a formula.

    Raises:
      SphinxError: it has a command that is not known.
    """
    tex = re.sub(r"\\[A-Za-z]+", lambda found: _WORDS.get(found[0], found[0]), tex)
    if r"\\" in tex and r"\begin" not in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    made = convert(tex, display=display)
    if unknown := re.findall(r"\\[A-Za-z]+", made):
        raise SphinxError(f"{', '.join(unknown)} has no MathML here, in the formula {tex}")
    return made


def _inline(self, node) -> None:
    self.body.append(mathml(node.astext(), "inline"))
    raise SkipNode


def _block(self, node) -> None:
    body = mathml(node.astext(), "block")
    self.body.append(f'<div class="math">{body}</div>\n')
    raise SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
