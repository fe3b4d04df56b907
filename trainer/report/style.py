"""The page's style sheet: light and dark, from a phone to a desk, and on paper."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --soft: #f5f6f8; --ink: #1b2026; --muted: #5c6672; --line: #dfe3e8;
  --accent: #0a5ea8; --accent-soft: #0a5ea81f; --before: #7b8794; --warn: #9a5b00; --warn-soft: #fff6e6;
  --good: #1a7440; --bad: #b3261e;
  --s0: #5c6672; --s1: #0a5ea8; --s2: #b04a00; --s3: #1a7440; --s4: #8a2f9c; --s5: #6f5c00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --soft: #1c2026; --ink: #e7eaee; --muted: #9da8b4; --line: #2e343c;
    --accent: #74b8f7; --accent-soft: #74b8f726; --before: #8d99a6; --warn: #f0b45b; --warn-soft: #2a2214;
    --good: #6fcf97; --bad: #ff8a80;
    --s0: #9da8b4; --s1: #74b8f7; --s2: #ff9f5a; --s3: #6fcf97; --s4: #d9a3ee; --s5: #d9c653;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
main { max-width: 1080px; margin: 0 auto; padding: clamp(24px, 5vw, 64px) clamp(16px, 4vw, 40px) 64px; }
h1, h2, h3 { line-height: 1.2; font-weight: 650; letter-spacing: -.01em; text-wrap: balance; }
h1 { font-size: clamp(1.7rem, 4.5vw, 2.4rem); margin: 0 0 .6rem; }
h2 { font-size: 1.3rem; margin: 0 0 1rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
p { margin: 0 0 .8rem; max-width: 46rem; }
a { color: var(--accent); }
section { margin-top: clamp(40px, 6vw, 64px); }
.kicker { color: var(--muted); font-size: .85rem; margin: 0 0 .4rem; }
.question { font-size: 1.15rem; color: var(--muted); }
.answer { font-size: clamp(1.15rem, 2.5vw, 1.4rem); line-height: 1.45; margin: 1.4rem 0 1rem; max-width: 50rem; }
.note, figcaption small, .tile p { color: var(--muted); }
.note { font-size: .9rem; }
.aside { border-left: 3px solid var(--line); background: var(--soft); padding: .8rem 1rem; margin: 1.2rem 0;
  border-radius: 0 6px 6px 0; max-width: 50rem; }
.aside p:last-child, .aside ul:last-child { margin-bottom: 0; }
.caveat { border-color: var(--warn); background: var(--warn-soft); }
.aside ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--warn); }
code, pre { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--soft); padding: 1rem; border-radius: 6px; }
summary { cursor: pointer; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 3px; border-radius: 2px; }
main:focus { outline: none; }
.skip { position: absolute; left: -999rem; }
.skip:focus { left: 1rem; top: 1rem; padding: .5rem .9rem; background: var(--paper); z-index: 1; }
nav { margin-top: 1.4rem; font-size: .9rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; list-style: none; margin: 0; padding: 0; }
nav a { display: inline-block; padding: .15rem 0; }
section { scroll-margin-top: 1rem; }
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }

.figures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1px;
  margin: 0; background: var(--line); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.figures > div { background: var(--paper); padding: 1rem 1.1rem; }
.figures > div:last-child:nth-child(3n + 1) { grid-column: 1 / -1; }
.figures dt { font-size: .85rem; color: var(--muted); }
.figures dd { margin: 0; }
.figures .big { font-size: 1.45rem; font-weight: 600; letter-spacing: -.01em; white-space: nowrap; }
.figures .small { font-size: .85rem; color: var(--muted); }
.figures .was { color: var(--muted); font-weight: 400; }

.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: 0 0 1.2rem; font-size: .9rem; }
.legend label { display: inline-flex; align-items: center; gap: .45rem; cursor: pointer; }
.legend svg { width: 34px; height: 18px; background: #23272c; border-radius: 3px; }
.legend input { accent-color: var(--accent); margin: 0; }
body:has(#show-truth:not(:checked)) .tile .truth, body:has(#show-prediction:not(:checked)) .tile .prediction,
body:has(#show-prompt:not(:checked)) .tile .prompt { display: none; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 2rem 1.6rem; }
figure { margin: 0; min-width: 0; }
.tiles { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; }
.panels.single { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.single .tiles > :only-child { grid-column: 1 / -1; }
.tile svg { display: block; width: 100%; aspect-ratio: 1; background: #000; border-radius: 4px; }
.tile p { margin: .25rem 0 0; font-size: .9rem; }
.tile b { color: var(--ink); font-weight: 600; }
figcaption { font-size: .9rem; line-height: 1.4; margin-top: .2rem; }
figcaption small { overflow-wrap: anywhere; }
.truth, .prediction, .prompt { fill: none; vector-effect: non-scaling-stroke; }
.truth { stroke: #56b4e9; stroke-width: 1.5; }
.prediction { stroke: #ffb000; stroke-width: 1.5; stroke-dasharray: 4 3; fill: #ffb000; fill-opacity: .2;
  fill-rule: evenodd; }
.prompt { stroke: #fff; stroke-opacity: .85; stroke-width: 1; stroke-dasharray: 1 3; }
.prompt.point { stroke-width: 2; stroke-dasharray: none; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 2rem; }
.charts + .note, .facts + .note { margin-top: .9rem; }
.charts .words { align-self: center; }
.chart { display: block; width: 100%; max-width: 560px; height: auto; overflow: visible; }
.chart text { font-size: 12px; fill: var(--muted); }
.chart .axis { fill: var(--ink); }
.chart .grid { stroke: var(--line); }
.chart path { fill: none; }
.chart .raw { stroke: var(--accent); stroke-opacity: .28; }
.chart .smooth { stroke: var(--accent); stroke-width: 2.25; stroke-linejoin: round; }
.chart .mark { fill: var(--paper); stroke: var(--warn); stroke-width: 2; }
.pair path { stroke: var(--accent); stroke-opacity: var(--strength); stroke-width: 1.2; }
.pair circle { fill: var(--accent); fill-opacity: .55; }
.pair.fell path { stroke: var(--bad); stroke-opacity: .8; stroke-dasharray: 5 3; }
.pair.fell circle { fill: var(--bad); }
.pair:hover path { stroke-opacity: 1; stroke-width: 3; }
.jitter path { stroke: var(--before); stroke-width: 2; stroke-dasharray: 6 4; stroke-linejoin: round; }
.jitter circle { fill: var(--before); }
.jitter.after path { stroke: var(--accent); stroke-width: 2.25; stroke-dasharray: none; }
.jitter.after circle { fill: var(--accent); }
.box path, .box rect { stroke: var(--before); stroke-width: 1.5; fill: none; }
.box.after path, .box.after rect { stroke: var(--accent); }
.box rect { fill: var(--soft); } .box.after rect { fill: var(--accent-soft); }
.box .median { stroke-width: 3; }
.s0 { --own: var(--s0); } .s1 { --own: var(--s1); } .s2 { --own: var(--s2); }
.s3 { --own: var(--s3); } .s4 { --own: var(--s4); } .s5 { --own: var(--s5); }
.dist path { stroke: var(--own); stroke-width: 1.3; }
.dist rect { stroke: var(--own); stroke-width: 1.3; fill: var(--own); fill-opacity: .16; }
.dist.s0 rect { stroke-dasharray: 3 2; fill-opacity: .06; }
.dist .median { stroke-width: 2; }
.dist .point { fill: var(--own); stroke: var(--paper); stroke-width: .8; }
.dist circle { fill: var(--own); fill-opacity: .55; }
.dist:hover rect { fill-opacity: .35; }
.line > path:first-of-type { stroke-width: 2; stroke-linejoin: round; }
.line:hover > path:first-of-type { stroke-width: 3.5; }
.chart .group { font-weight: 600; } .chart .count { font-weight: 400; fill: var(--muted); }

/* a shade at an edge where there is more to scroll to */
.scroll { overflow-x: auto; margin: 0 0 .8rem; background:
  linear-gradient(90deg, var(--paper) 40%, transparent) 0 0 / 3rem 100% no-repeat local,
  linear-gradient(270deg, var(--paper) 40%, transparent) 100% 0 / 3rem 100% no-repeat local,
  linear-gradient(90deg, var(--line), transparent) 0 0 / .9rem 100% no-repeat scroll,
  linear-gradient(270deg, var(--line), transparent) 100% 0 / .9rem 100% no-repeat scroll; }
table { border-collapse: collapse; min-width: min(100%, 34rem); font-size: .92rem; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: .85rem; vertical-align: bottom; }
th, td { padding: .45rem 1.5rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.number { text-align: right; white-space: nowrap; }
tfoot td { font-weight: 600; border-bottom: 0; }
td code, td small, td b { white-space: nowrap; }
.bar { display: inline-block; height: .55rem; background: var(--accent); border-radius: 2px; min-width: 2px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
  gap: .9rem 2rem; margin: 0; }
.facts dt { font-size: .85rem; color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.facts > .wide { grid-column: 1 / -1; }
.words .facts { margin-bottom: 1.2rem; grid-template-columns: 1fr 1fr; }
.whole { white-space: nowrap; }
.below { margin-top: 1.6rem; }

@media (max-width: 760px) {
  .figures { grid-template-columns: 1fr 1fr; }
  .figures > div:last-child:nth-child(even) { grid-column: auto; }
  .figures > div:last-child:nth-child(odd) { grid-column: 1 / -1; }
}
@media (max-width: 520px) {
  .figures > div { padding: .8rem; } .figures .big { font-size: 1.15rem; white-space: normal; }
  .chart text { font-size: 15px; } .chart .turned { display: none; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --soft: #f5f6f8; --ink: #000; --muted: #444; --line: #ccc;
    --accent: #0a5ea8; --accent-soft: #0a5ea81f; --before: #666; --warn: #9a5b00; --warn-soft: #fff; --good: #1a7440;
    --bad: #b3261e; --s0: #555; --s1: #0a5ea8; --s2: #b04a00; --s3: #1a7440; --s4: #8a2f9c; --s5: #6f5c00; }
  body { font-size: 11pt; } main { max-width: none; padding: 0; } .legend input, nav, .skip { display: none; }
  details::details-content { content-visibility: visible; display: block; } pre { white-space: pre-wrap; }
  a { color: inherit; }
  section { margin-top: 2rem; } figure, tr, .figures, .chart { break-inside: avoid; } h2 { break-after: avoid; }
  .panels, .charts { grid-template-columns: 1fr 1fr; } .scroll { overflow: visible; background: none; }
  table { font-size: .8rem; } tfoot { display: table-row-group; } .figures { grid-template-columns: repeat(3, 1fr); }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
