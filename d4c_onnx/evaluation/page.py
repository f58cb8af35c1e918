"""One self-contained HTML page about a calibration set: nothing is loaded from elsewhere, and no script runs."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from d4c_onnx.evaluation.layer_inputs import LayerInput

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #222 }
.images { display: flex; flex-wrap: wrap; gap: 8px }
figure { margin: 0; width: 104px; font-size: 11px; text-align: center; overflow-wrap: anywhere }
figure img { width: 104px; image-rendering: auto; border-radius: 3px }
table { border-collapse: collapse; font-size: 13px }
th, td { padding: 2px 10px; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
svg { background: #fafafa; border: 1px solid #eee; margin: 0 8px 8px 0 }
"""


def calibration_page(
    title: str,
    facts: Mapping[str, str],
    images: np.ndarray,
    captions: Sequence[str],
    losses: Sequence[Mapping[str, Sequence[float]]],
    inputs: Mapping[str, Sequence[LayerInput]],
) -> str:
    """The page as text.

    Args:
        facts: what to say about the set, by name.
        images: float32 [N, 3, H, W] in 0..1, as a person should see them.
        captions: one per image; may be shorter.
        losses: loss terms by name, one value per pass, for each unit that was optimised together.
        inputs: what reaches each layer under each source of images, the set itself first.
    """
    shown = [*captions, *[""] * len(images)][: len(images)]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        "<table>"
        + "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in facts.items())
        + "</table>",
        "<h2>Loss terms</h2>" + _curves(losses) if losses else "",
        "<h2>What reaches each layer</h2>",
        "<p>Ranges decide the activation grids. The effective rank (of the input's second moment; at most the number "
        "of channels) says how many directions the rounding of weights gets to know.</p>",
        _layers(inputs),
        "<h2>Images</h2>",
        f'<div class="images">{"".join(map(_figure, images, shown))}</div>',
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style>\n{body}\n</html>\n"
    )


def _figure(image: np.ndarray, caption: str) -> str:
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    shown = html.escape(caption)
    return f'<figure><img alt="{shown}" src="data:image/png;base64,{data}"><figcaption>{shown}</figcaption></figure>'


def _curves(losses: Sequence[Mapping[str, Sequence[float]]]) -> str:
    """One small chart per term, one line per unit."""
    return "".join(_chart(name, [unit[name] for unit in losses if name in unit]) for name in losses[0])


def _chart(name: str, lines: Sequence[Sequence[float]], width: int = 250, height: int = 130) -> str:
    values = np.concatenate([np.asarray(line, float) for line in lines])
    low, high = float(values.min()), float(values.max())
    span = (high - low) or 1.0
    drawn = []
    for line in lines:
        thinned = line[:: max(1, len(line) // 200)]
        across = (width - 16) / max(1, len(thinned) - 1)
        down = (height - 34) / span
        points = " ".join(f"{8 + across * i:.1f},{height - 8 - down * (v - low):.1f}" for i, v in enumerate(thinned))
        drawn.append(f'<polyline points="{points}" fill="none" stroke="#2471a3" stroke-width="1" opacity="0.6"/>')
    label = f"{html.escape(name)}: {low:.3g} to {high:.3g}"
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{label}">'
        f'<text x="8" y="16" font-size="12">{label}</text>{"".join(drawn)}</svg>'
    )


def _layers(inputs: Mapping[str, Sequence[LayerInput]]) -> str:
    names = list(inputs)
    header = "".join(f'<th colspan="2">{html.escape(name)}</th>' for name in names)
    below = "<th>range</th><th>effective rank</th>" * len(names)
    rows = []
    for entries in zip(*inputs.values(), strict=True):
        cells = "".join(f"<td>{e.low:.3g} .. {e.high:.3g}</td><td>{e.effective_rank:.1f}</td>" for e in entries)
        rows.append(f"<tr><td>{html.escape(entries[0].node)}</td><td>{entries[0].channels}</td>{cells}</tr>")
    first = f"<tr><th>layer</th><th>channels</th>{header}</tr><tr><th></th><th></th>{below}</tr>"
    return f"<table>{first}{''.join(rows)}</table>"
