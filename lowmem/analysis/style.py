"""The style sheet of a report: light and dark, from the width of a phone upwards."""

STYLE = """
:root {
  --paper: #ffffff; --ink: #1c1f23; --quiet: #5c6570; --line: #dfe3e8; --panel: #f5f7f9;
  --good: #14683a; --good-back: #dcf2e4; --warn: #8a4b00; --warn-back: #fdebd0;
  --c0: #1f6fb4; --c1: #d1600a; --c2: #2b8a3e; --c3: #b3273f;
  --c4: #7a4fb5; --c5: #8a5a44; --c6: #c2428f; --c7: #0e8088;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e7eaed; --quiet: #9aa4af; --line: #333a41; --panel: #1d2226;
    --good: #7fdca4; --good-back: #173a26; --warn: #f5c27a; --warn-back: #432c0c;
    --c0: #6cb2ee; --c1: #f5954a; --c2: #6fcf86; --c3: #f07a8d;
    --c4: #b99af0; --c5: #cfa28e; --c6: #ef8ccb; --c7: #55c9d0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere;
}
h1 { margin: 0 0 .4rem; font-size: 1.6rem; line-height: 1.2; }
h2 { margin: 2rem 0 .6rem; font-size: 1.15rem; }
h3 { margin: 1rem 0 .3rem; font-size: 1rem; }
p { margin: .3rem 0; }
.quiet, .note, figcaption { color: var(--quiet); font-size: .875rem; }
.pill { display: inline-block; padding: .1rem .7rem; border-radius: 1rem; font-size: .875rem; }
.pill.finished { color: var(--good); background: var(--good-back); }
.pill.running, .pill.unfinished { color: var(--warn); background: var(--warn-back); }
.cards {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem;
  margin: 1rem 0;
}
.cards div { padding: .6rem .8rem; background: var(--panel); border-radius: .4rem; }
.cards dt { color: var(--quiet); font-size: .875rem; }
.cards dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.cards dd.quiet { font-size: .8rem; }
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem;
}
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg .text { fill: var(--quiet); font-size: 10.5px; }
svg path { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
svg .grid { stroke: var(--line); stroke-width: .7; }
svg .axis { stroke: var(--quiet); stroke-width: 1; }
svg .raw { stroke-width: .8; opacity: .35; }
svg .mark { fill: var(--ink); stroke: var(--paper); stroke-width: 1; }
svg .c0 { stroke: var(--c0); } svg .c1 { stroke: var(--c1); } svg .c2 { stroke: var(--c2); }
svg .c3 { stroke: var(--c3); } svg .c4 { stroke: var(--c4); } svg .c5 { stroke: var(--c5); }
svg .c6 { stroke: var(--c6); } svg .c7 { stroke: var(--c7); }
svg .point { fill: var(--paper); stroke-width: 1.6; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
th, td {
  padding: .3rem .5rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line);
}
td { overflow-wrap: break-word; }
td:last-child:not(:nth-child(2)) { width: 42%; }
td:last-child { overflow-wrap: anywhere; }
th { font-weight: 600; overflow-wrap: break-word; }
tbody th { width: 9rem; font-weight: normal; color: var(--quiet); }
.parts td:last-child:not(:nth-child(2)) { width: auto; }
.parts tbody th { width: 35%; color: var(--ink); }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar { display: block; margin-top: .15rem; }
.bar i { display: block; height: .25rem; min-width: 1px; margin-bottom: 1px; }
.planned { background: var(--quiet); opacity: .55; }
.seen { background: var(--c0); }
summary { cursor: pointer; padding: .3rem 0; }
pre {
  margin: .3rem 0; padding: .8rem; background: var(--panel); border-radius: .4rem;
  white-space: pre-wrap; font-size: .8rem;
}
ul { margin: .3rem 0; padding-left: 1.2rem; font-size: .9rem; }
footer { margin-top: 2rem; }
@media (max-width: 30rem) {
  tbody th { width: 6.5rem; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
"""
