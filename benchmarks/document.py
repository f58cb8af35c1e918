"""What the measuring scripts share: putting a table into a document."""

from pathlib import Path


def write_document(path: Path, text: str) -> None:
    """Replace what stands between the document's `<!-- table -->` markers."""
    before, _, rest = path.read_text("utf-8").partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- /table -->\n")
    path.write_text(f"{before}<!-- table -->\n{text}\n<!-- /table -->\n{after}", "utf-8")
