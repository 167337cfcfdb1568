"""Pages that hold everything that they show: one look, pictures as data, and the few lines of script of the sliders.

A slider has no pictures of its own: the script gives it those of the page, and without a script it is not there.

Such a page asks the network for nothing: it can be mailed, kept as a CI artifact and opened in ten years. jinja2 is
imported where a page is made.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING

from lora_fuse.machine import text

if TYPE_CHECKING:
    from jinja2 import Environment

SLIDER = """
for (const slider of document.querySelectorAll(".slider")) {
  const range = slider.querySelector("input");
  slider.hidden = false;
  for (const image of slider.querySelectorAll("img")) image.src = document.getElementById(image.dataset.of).src;
  range.addEventListener("input", () => slider.style.setProperty("--at", range.value + "%"));
}
"""
SLIDER_HASH = "sha256-" + base64.b64encode(hashlib.sha256(SLIDER.encode()).digest()).decode()


def render_page(
    package: str, template: str, *, filters: Mapping[str, Callable[..., object]] | None = None, **values: object
) -> str:
    """Fill a template of a package's folder `templates`, which may include `style.css`, `slider` and `slider_hash`.

    Every value is escaped, by HTML's rules and `text.xml` or by those of Markdown, unless it is `Markdown` or marked
    safe; one that is missing is an error.
    """
    environment = _environment(package, ".html" in template, tuple(sorted((filters or {}).items())))
    return environment.get_template(template).render(slider=SLIDER, slider_hash=SLIDER_HASH, **values)


@cache
def _environment(package: str, html: bool, filters: tuple[tuple[str, Callable[..., object]], ...]) -> Environment:
    """The holder of a package's templates once they are compiled, which takes longer than to fill one."""
    import jinja2

    loaders = [jinja2.PackageLoader(name) for name in (package, "lora_fuse.pictures")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=html,  # noqa: S701 (Markdown has rules of its own)
        finalize=_seen if html else text.markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": text.code, "link": text.link, **dict(filters)}
    return environment


def _seen(value: object) -> object:
    return value if hasattr(value, "__html__") else text.xml(value)
