"""Ten hostile strings, as anything from outside may be called, and the token that nobody may see."""

from xml.etree import ElementTree

TOKEN = "hf_" + "A1b2C3d4E" * 4
FOREIGN = (
    "\x1b[2J\x1b[31mred",
    "name\ndownload: passed",
    "\r\x9b31m\x07\x00\x7f\u2028",
    "\u202egnp.exe\u2066\ufeff\u200b",
    "not UTF-8 \udcff, no character \uffff ]]>",
    "![x](https://evil.example/t.png) <https://evil.example>",
    "[click](https://evil.example) @org/team https://evil.example www.evil.example owner/name#1",
    "<img src=x onerror=alert(1)></td></table> <script>alert(1)</script> &lt;",
    "a | b `c` ``d`` \\ | *e* $f$ ~~g~~",
    f"\n\n# A heading\n```\n- item\n---\n{TOKEN} https://cdn.example/x?signature=5ecret",
)


def read_xml(text: str | bytes) -> ElementTree.Element:
    """The root of a document that was just made."""
    return ElementTree.fromstring(text)  # noqa: S314
