"""Style sheet of the page: light and dark, readable on a phone, with the fonts of the system."""

from __future__ import annotations

from collections.abc import Sequence

from kd_accel.report.svg import DARK_COLORS, LIGHT_COLORS

_LIGHT = {
    "page": "#f6f8fa",
    "card": "#ffffff",
    "text": "#1f2328",
    "muted": "#59636e",
    "line": "#d8dee4",
    "grid": "#e4e8ec",
    "good": "#2a78d6",
    "bad": "#e5534b",
    "warn": "#9a6700",
    "warn-back": "#fff4d1",
}
_DARK = {
    "page": "#0d1117",
    "card": "#151b23",
    "text": "#e6edf3",
    "muted": "#9198a1",
    "line": "#2f3742",
    "grid": "#262d36",
    "good": "#4493f8",
    "bad": "#f4695f",
    "warn": "#e3b341",
    "warn-back": "#3a2f10",
}

_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
 -webkit-text-size-adjust:100%}
main,header,footer{max-width:1240px;margin:0 auto;padding:0 20px}
header{padding-top:32px}
h1{font-size:28px;line-height:1.2;margin:0 0 12px;letter-spacing:-.01em}
h2{font-size:19px;margin:0 0 4px}
h3{font-size:15px;margin:0 0 6px}
p{margin:0 0 12px;max-width:80ch}
.note,footer,figcaption,small{color:var(--muted);font-size:13px}
footer{padding-bottom:32px}
.facts{display:flex;flex-wrap:wrap;gap:8px 28px;margin:0 0 24px;padding:0}
.facts div{display:flex;flex-direction:column}
.facts dt{color:var(--muted);font-size:12px}
.facts dd{margin:0;font-weight:600}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px;margin:0 0 20px}
.scroll{overflow-x:auto;margin:8px 0}
.scroll:focus-visible{outline:2px solid var(--good);outline-offset:2px}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
th,td{padding:7px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600}
thead th{color:var(--muted);font-size:12px;font-weight:600;vertical-align:bottom;white-space:normal;min-width:5.5em}
tbody tr:last-child>*{border-bottom:0}
th:first-child{text-align:left;padding-left:0}
tbody th{font-weight:600}
tbody th small{display:block;font-weight:400}
.results,.wide{width:100%}
.results{font-size:13px}
.results th,.results td{padding:7px 8px}
.results tbody th{white-space:normal;overflow-wrap:anywhere;min-width:17em}
.results th:first-child{padding-left:0}
.group>*{font-weight:600;background:color-mix(in srgb,var(--good) 7%,transparent)}
.text td,.text thead th{text-align:left}
.text td{white-space:normal;overflow-wrap:anywhere;min-width:8em}
.swatch{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:8px;background:var(--color)}
.chip{display:inline-block;margin-right:6px;padding:0 8px;border:1px solid var(--line);border-radius:99px;font-size:12px;
 font-weight:400;color:var(--muted)}
.unfinished{border-color:transparent;background:var(--warn-back);color:var(--warn)}
svg{display:block;width:100%;height:auto;font-family:inherit;stroke-linejoin:round}
figure{margin:0;min-width:0}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,310px),1fr));gap:20px;margin-top:12px}
.curves h3{margin-bottom:2px}
.scatter{max-width:820px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:8px 0 0;padding:0;font-size:14px}
.legend svg{display:inline-block;width:26px;height:10px;margin-right:6px;vertical-align:middle}
.heat td{background:color-mix(in srgb,var(--tone) calc(var(--share)*62%),transparent)}
.confusion{font-size:12px;width:100%;table-layout:fixed}
.confusion th,.confusion td{padding:5px 4px;overflow:hidden;text-overflow:ellipsis;text-align:center;
 border:1px solid var(--card)}
.confusion th:first-child{text-align:right;padding-left:0;width:5.5em}
.confusion thead th{white-space:nowrap}
.runs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,470px),1fr));gap:24px;margin-top:12px}
.runs>*{min-width:0}
.errors{display:grid;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));gap:14px;margin:12px 0 0}
.errors img{display:block;width:100%;aspect-ratio:1;object-fit:contain;border-radius:8px;border:1px solid var(--line);
 image-rendering:pixelated;background:var(--page)}
.errors figcaption{line-height:1.35;margin-top:5px;overflow-wrap:anywhere}
.errors b{color:var(--text);font-weight:600}
details{border-top:1px solid var(--line);padding-top:12px;margin-top:12px}
summary{cursor:pointer;font-weight:600}
dl.terms{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:12px 0 0;font-size:13px;color:var(--muted)}
dl.terms dt{font-weight:600}
dl.terms dd{margin:0}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
@media (max-width:600px){main,header,footer{padding:0 12px}header{padding-top:20px}
 .results tbody th{min-width:13em} section{padding:14px;border-radius:10px}
 dl.terms{grid-template-columns:1fr}dl.terms dd{margin-bottom:6px}}
@media print{section{break-inside:avoid;border:0;padding:0}body{background:none}}
"""


def style_sheet() -> str:
    """Return the style sheet."""
    dark = f"@media (prefers-color-scheme:dark){{:root{{{_variables(_DARK, DARK_COLORS)}}}}}"
    return f":root{{color-scheme:light dark;{_variables(_LIGHT, LIGHT_COLORS)}}}\n{dark}{_RULES}"


def _variables(colors: dict[str, str], runs: Sequence[str]) -> str:
    named = {**colors, **{f"run{index}": color for index, color in enumerate(runs)}}
    return ";".join(f"--{name}:{color}" for name, color in named.items())
