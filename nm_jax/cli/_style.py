"""The frame and the looks of a page: light, dark, on a phone and on paper."""

FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}: sparsity</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
STYLE = """
:root { --ink: #1b2430; --soft: #5b6675; --line: #d9dde3; --kept: #1d4f91; --bad: #b3261e; --good: #1b6e3c;
  --page: #fff; --bar: #eceff3; --tint: #fbeceb; color-scheme: light; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa6b5; --line: #333c48; --kept: #6ea8ff; --bad: #ff8a80; --good: #6fd08c;
    --page: #14181f; --bar: #252c36; --tint: #3a2020; color-scheme: dark; }
  .mask img { filter: invert(1) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem; color: var(--ink); background: var(--page);
  font: 16px/1.45 system-ui, sans-serif; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; break-after: avoid; }
h3 { font-size: 1rem; margin: 1.2rem 0 .6rem; overflow-wrap: anywhere; break-after: avoid; }
small, p, figcaption, dt { color: var(--soft); }
dl { display: flex; flex-wrap: wrap; gap: .8rem 2.4rem; margin: 0; padding: .8rem 1rem; border-left: 4px solid; }
dl.good { border-color: var(--good); } dl.bad { border-color: var(--bad); }
dt { font-size: .8rem; } dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child { overflow-wrap: anywhere; }
tr { break-inside: avoid; }
b { display: block; background: var(--bar); height: .8rem; font-weight: normal; }
b i { display: block; background: var(--kept); height: 100%; }
.bar { display: grid; grid-template-columns: minmax(8rem, 2fr) 3fr 5rem; gap: .8rem; align-items: center;
  font-size: .85rem; padding: .15rem 0; break-inside: avoid; }
.bar span { overflow-wrap: anywhere; } .bar em { font-style: normal; text-align: right; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
figcaption { font-size: .8rem; margin-top: .4rem; }
.mask { position: relative; width: 100%; max-width: 24rem; border: 1px solid var(--line); }
.mask img { width: 100%; height: 100%; image-rendering: pixelated; display: block; }
.mask svg { position: absolute; inset: 0; width: 100%; height: 100%; border: 0; }
.mask path { stroke: var(--soft); stroke-width: 1px; vector-effect: non-scaling-stroke; fill: none; }
svg { width: 100%; height: 12rem; display: block; border-bottom: 1px solid var(--line); }
svg rect { fill: var(--kept); }
.groups td:nth-child(1) { width: 2rem; } .groups td:nth-child(3) { width: 5rem; text-align: right; padding-right: 0; }
ul { padding-left: 1.2rem; } code { overflow-wrap: anywhere; }
tr.bad td { color: var(--bad); background: var(--tint); }
.groups .bad td { background: none; } .groups .bad i { background: var(--bad); }
@media screen and (max-width: 640px) {
  body { padding: 1rem; }
  table:not(.groups) thead { display: none; }
  table:not(.groups) tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--line); }
  table:not(.groups) td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; }
  table:not(.groups) td:empty { display: none; }
  table:not(.groups) td::before { content: attr(data-label); color: var(--soft); flex: none; }
  table:not(.groups) td:first-child { font-weight: 600; } table:not(.groups) td:first-child::before { content: none; }
  .bar { grid-template-columns: 1fr 5rem; } .bar span { grid-column: 1 / -1; }
}
@media print {
  @page { margin: 14mm; }
  html { font-size: 11px; }
  body { padding: 0; font-size: 1rem; max-width: none; }
  .figures { grid-template-columns: 1fr 1fr; } .mask { max-width: 5cm; } svg { height: 4cm; }
}
"""
