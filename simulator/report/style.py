"""The page's style sheet."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #14181d; --muted: #5b6672; --grid: #d9dee4;
  --soft: #f3f5f7; --notice: #fff4d6; --series-0: #0072b2; --series-1: #d55e00; --series-2: #009e73;
  --series-3: #b8619a; --series-4: #8a6d00; --series-5: #3f9fd8; --series-7: #9b4f10; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e8ecf1; --muted: #a3adb8; --grid: #343c46;
  --soft: #1e242b; --notice: #3a3218; --series-0: #4fb3f0; --series-1: #ff8f45; --series-2: #3fd6a8;
  --series-3: #e79bce; --series-4: #e0c14a; --series-5: #9bd4f7; --series-7: #d99560; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .6rem 0 1rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.4rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--grid); overflow-wrap: anywhere; }
p, li { max-width: 44rem; }
.notice { background: var(--notice); padding: .7rem .9rem; border-radius: .4rem; max-width: none; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .2rem 0 .4rem; }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--grid); text-align: left;
  vertical-align: top; }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
.short { white-space: nowrap; }
tbody th[scope=row], thead th:first-child { position: sticky; left: 0; background: var(--paper);
  overflow-wrap: break-word; min-width: 6rem; max-width: 15rem; }
.group { padding-top: .9rem; color: var(--muted); font-weight: 600; }
.group span { position: sticky; left: 0; }
@media (max-width: 34rem) { main { padding: 1rem .6rem 3rem; } table { font-size: .78rem; }
  th, td { padding-right: .5rem; } tbody th[scope=row], thead th:first-child { max-width: 6.5rem;
  overflow-wrap: anywhere; } }
figure { margin: 1.4rem 0; }
.panels { display: flex; flex-wrap: wrap; gap: 1rem; }
.panel { flex: 1 1 20rem; min-width: 0; max-width: 34rem; }
.panel svg { width: 100%; height: auto; display: block; }
.panel svg text { font-family: inherit; }
figcaption { font-size: .9rem; color: var(--muted); max-width: 60rem; margin-top: .3rem; }
figcaption strong { color: var(--ink); }
pre { background: var(--soft); padding: .8rem; border-radius: .4rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .85rem; }
@media print { :root { --paper: #ffffff; --ink: #000000; --muted: #444444; --grid: #bbbbbb; --soft: #f3f5f7;
  --notice: #f3f5f7; --series-0: #0072b2; --series-1: #d55e00; --series-2: #009e73; --series-3: #b8619a;
  --series-4: #8a6d00; --series-5: #3f9fd8; --series-7: #9b4f10; }
  body { font-size: 11pt; } main { max-width: none; padding: 0; } .wide { overflow: visible; }
  table { font-size: 8pt; } figure, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""
