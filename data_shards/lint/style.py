"""The page's style sheet: light and dark, from a phone to a desk."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --soft: #f4f5f7; --ink: #1a1f25; --muted: #59636f; --line: #dde1e6; --link: #0b5cad;
  --error: #b3261e; --error-soft: #fdeceb; --warning: #8a5200; --warning-soft: #fff4e0;
  --note: #0b5cad; --note-soft: #e9f2fc; --clean: #1a7440;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --soft: #1d2127; --ink: #e6e9ed; --muted: #9aa5b1; --line: #2f353d; --link: #79b8f5;
    --error: #ff8a80; --error-soft: #3a1d1b; --warning: #f0b45b; --warning-soft: #33270f;
    --note: #79b8f5; --note-soft: #14293d; --clean: #6fcf97;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); font-variant-numeric: tabular-nums;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: clamp(24px, 5vw, 64px) clamp(16px, 4vw, 40px) 64px; }
h1, h2 { line-height: 1.25; letter-spacing: -.01em; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.3rem); margin: 0 0 .6rem; }
h2 { font-size: 1.2rem; margin: 0 0 .5rem; }
p { margin: 0 0 .8rem; max-width: 46rem; }
a { color: var(--link); }
code { font: .86em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
section { margin-top: clamp(36px, 5vw, 56px); scroll-margin-top: 16px; }
.kicker, .note, .count, small { color: var(--muted); }
.kicker { font-size: .85rem; margin: 0 0 .4rem; }
.answer { font-size: clamp(1.1rem, 2.5vw, 1.35rem); line-height: 1.45; border-left: 4px solid var(--clean);
  padding-left: .9rem; margin: 1.2rem 0; }
.answer.error { border-color: var(--error); } .answer.warning { border-color: var(--warning); }
.aside { background: var(--soft); border-radius: 6px; padding: .8rem 1rem; max-width: 46rem; }
.aside p { margin: 0; }
.badge { display: inline-block; white-space: nowrap; font-size: .8rem; font-weight: 500; line-height: 1.5;
  padding: 0 .55rem; border-radius: 1rem; letter-spacing: 0; }
.badge.error { color: var(--error); background: var(--error-soft); }
.badge.warning { color: var(--warning); background: var(--warning-soft); }
.badge.note { color: var(--note); background: var(--note-soft); }
h2 .badge { vertical-align: .15em; }
.count { font-weight: 400; }
.panels { display: grid; gap: 1.6rem 1.2rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); }
.panels:has(.pair) { grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; min-width: 0; }
.tiles { display: grid; grid-template-columns: 1fr; gap: 4px; background: #000; border-radius: 6px; overflow: hidden; }
.tiles.pair { grid-template-columns: 1fr 1fr; }
.tiles img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: auto; }
.tiles .blank { color: #aab2bb; text-align: center; padding: 3rem 1rem; margin: 0; }
figcaption { font-size: .88rem; line-height: 1.4; margin-top: .4rem; overflow-wrap: anywhere; }
.legend ul { list-style: none; padding: 0; }
.legend span { display: inline-block; width: 2.2rem; height: 1.5rem; margin-right: .4rem; vertical-align: middle;
  background: #22262b; border-radius: 3px; outline-offset: -6px; }
ul { margin: .6rem 0 0; padding-left: 1.2rem; }
li { margin-bottom: .4rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; min-width: min(100%, 34rem); }
th { text-align: left; color: var(--muted); font-weight: 600; font-size: .85rem; }
th, td { padding: .4rem 1.3rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.counts td:nth-child(3) { min-width: 14rem; }
td a { white-space: nowrap; } td code { overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
@media (max-width: 600px) {
  .panels { grid-template-columns: 1fr 1fr; } .panels:has(.pair) { grid-template-columns: 1fr; }
  .counts :is(th, td):nth-child(n+3):not(:last-child) { display: none; } td a { white-space: normal; }
  table { min-width: 100%; } th, td { padding-right: .8rem; }
}
@media print { figure, tr { break-inside: avoid; } main { max-width: none; padding: 0; } }
"""
