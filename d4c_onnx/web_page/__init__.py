"""The page that shows a model's scores of dropped pictures: one HTML file that asks nobody but its engine.

`serve` gives it an engine that asks the server, `package --target web` one that runs both encoders in the browser.
"""

import base64
import hashlib
import re
from importlib.resources import files

SERVER, BROWSER = "server.js", "browser.js"
_PLACE = "/* engine */"


def page_of(engine: str) -> str:
    """The whole page.

    Args:
        engine: `SERVER` or `BROWSER`: the script that has `describe()` and `zeroShot(files, labels, template)`.
    """
    folder = files(__name__)
    page = (folder / "page.html").read_text("utf-8")
    return page.replace(_PLACE, (folder / engine).read_text("utf-8"))


def content_security_policy(page: str) -> str:
    """A header's value that lets the page run its own script, show dropped pictures, ask its server, and no more."""
    [style], [script] = (re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, re.DOTALL) for tag in ("style", "script"))
    own = f"style-src {_hash(style)}; script-src {_hash(script)}; connect-src 'self'; img-src blob: data:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _hash(content: str) -> str:
    digest = base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")
    return f"'sha256-{digest}'"
