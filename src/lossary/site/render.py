"""How a page is made: the templates, prose and code as HTML, addresses."""

import functools
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from pygments.lexers.python import PythonLexer
from pygments.token import Token

from lossary import __version__
from lossary.site import plot

HERE = Path(__file__).parent
# How code is marked; the rest stays plain, which halves a page.
MARKS = {
    Token.Literal.String.Doc: ("<i>", "</i>"),
    Token.Comment: ("<i>", "</i>"),
    Token.Literal.String: ("<q>", "</q>"),
    Token.Keyword: ("<b>", "</b>"),
    Token.Operator.Word: ("<b>", "</b>"),
    Token.Name.Decorator: ("<b>", "</b>"),
    Token.Name.Function: ("<u>", "</u>"),
    Token.Name.Class: ("<u>", "</u>"),
}
PLAIN = ("", "")


@functools.cache
def environment() -> Environment:
    """One for the whole site; whatever is put into a page is escaped unless it is `Markup`."""
    env = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    env.globals |= {"version": __version__, "plot": plot, "vendored": (HERE / "static/vendor/katex").is_dir()}
    env.filters |= {"time": duration, "name": symptom_name, "code": code, "figure": plot.figure, "capital": capital}
    return env


def page(template: str, *, here: str = "", static: bool = False, **context: Any) -> str:
    """The page as text.

    Args:
        template: its file in `templates`.
        here: the page's address without the leading slash.
        static: whether it is written to a file: its links are then relative and end in .html.
        **context: what the template shows.
    """
    to = addresses(here if static else None)
    return environment().get_template(template).render(to=to, here=here, static=static, **context)


def addresses(here: str | None) -> Callable[[str], str]:
    """What turns an address of the site, such as rooms/losses, into a link: from the file of `here`, or on a server."""
    if here is None:
        return lambda address: "/" + address

    def to(address: str) -> str:
        address, hash, part = address.partition("#")
        return "../" * here.count("/") + file_of(address) + hash + part

    return to


def file_of(address: str) -> str:
    """The file that holds the page at an address of the site, when it is written to a folder."""
    name = address or "index"
    return name if "." in name.rpartition("/")[2] else f"{name}.html"


def prose(text: str, links: Mapping[str, str] | None = None, notes: Mapping[str, str] | None = None) -> Markup:
    """A docstring's prose as HTML: paragraphs, lists, tables and `code`.

    Args:
        text: the prose.
        links: where code that is such a name leads.
        notes: what follows such a name, in brackets.
    """
    return Markup(_markdown().render(text, {"links": links or {}, "notes": notes or {}}))


def line(text: str, links: Mapping[str, str] | None = None) -> Markup:
    """The same for a single line."""
    return Markup(_markdown().renderInline(text, {"links": links or {}, "notes": {}}))


@functools.cache
def _markdown() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    # Formulas in docstrings are full of stars and underscores that mean neither emphasis nor HTML.
    parser.disable(["emphasis", "html_block", "html_inline", "image", "link", "autolink", "entity", "escape"])
    parser.add_render_rule("code_inline", _inline_code)
    parser.add_render_rule("code_block", _block)
    frame = '<div class="scroll" role="region" tabindex="0" aria-label="Table"><table>\n'
    parser.add_render_rule("table_open", lambda *_: frame)
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return parser


def _block(renderer: Any, tokens: Any, index: int, options: Any, env: Mapping[str, Any]) -> str:
    return f'<pre tabindex="0"><code>{escape(tokens[index].content)}</code></pre>\n'


def _inline_code(renderer: Any, tokens: Any, index: int, options: Any, env: Mapping[str, Any]) -> str:
    text = tokens[index].content
    shown = f"<code>{escape(text)}</code>"
    if target := env["links"].get(text):
        shown = f'<a href="{escape(target)}">{shown}</a>'
    note = env["notes"].get(text)
    return f'{shown} <span class="note">{escape(note)}</span>' if note else shown


def code(source: str) -> Markup:
    """Python with comments and docstrings in i, strings in q, keywords in b, and in u the names that it defines."""
    return Markup("".join(_coloured(source)))


def _coloured(source: str) -> Iterator[str]:
    held, mark = "", PLAIN
    for token, text in PythonLexer(stripnl=False, ensurenl=False).get_tokens(source):
        own = _mark_of(token)
        if own == mark or not text.strip():
            held += text
            continue
        yield _marked(mark, held)
        held, mark = text, own
    yield _marked(mark, held)


def _mark_of(token: Any) -> tuple[str, str]:
    while token is not Token:
        if token in MARKS:
            return MARKS[token]
        token = token.parent
    return PLAIN


def _marked(mark: tuple[str, str], text: str) -> str:
    body = text.rstrip()
    return mark[0] + escape(body, False) + mark[1] + text[len(body) :]


def duration(seconds: float | None) -> str:
    """0.02 s, 42 s, 2 min 5 s."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{int(seconds / 60)} min" + (f" {int(seconds % 60)} s" if seconds < 600 else "")


def symptom_name(symptom: str) -> str:
    """class-imbalance as Class imbalance."""
    return symptom.replace("-", " ").capitalize()


def capital(text: str) -> str:
    """With a capital at its beginning, unless it has its own, as mAP."""
    return text if text[1:2].isupper() else text[:1].upper() + text[1:]
