"""The page's one template, its style sheet, and its words on how a run measures."""

from string import Template

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --ink: #1f2933;
  --muted: #5f6b76; --rule: #e3e6ea; --accent: #0072b2; --alert: #a32b00; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #121416; --card: #1a1a1a; --ink: #e4e7ea; --muted: #9aa5b0; --rule: #2d3237;
    --accent: #6cb8e6; --alert: #ff9d78; }
  img { filter: invert(0.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { font-size: 1.05rem; font-weight: 600; margin: 0 0 .6rem; color: var(--muted); }
.headline { font-size: clamp(1.3rem, 3.2vw, 1.75rem); line-height: 1.3; font-weight: 600;
  letter-spacing: -.01em; margin: 0 0 1.4rem; text-wrap: pretty; }
h2 { font-size: 1.1rem; margin: 3rem 0 .9rem; }
h3 { font-size: 1rem; margin: 2rem 0 .2rem; }
h3 small { font-weight: 400; font-size: .82rem; color: var(--muted); }
a { color: var(--accent); overflow-wrap: anywhere; }
.problem { border-left: 3px solid var(--alert); padding: .1rem .9rem; color: var(--alert); }
.note { color: var(--muted); font-size: .9rem; max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem 1.1rem .32rem 0; text-align: right; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--rule); }
thead th { font-size: .8rem; font-weight: 500; color: var(--muted); }
tbody th { font-weight: 400; text-align: left; }
th:first-child { text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
table.words { width: 100%; min-width: 44rem; }
table.words th, table.words td { text-align: left; white-space: normal; vertical-align: top; }
table.words td:nth-child(3) { width: 40%; }
table.words td:nth-child(4) { width: 22%; font-size: .85rem; }
th small { color: var(--muted); }
td.words { text-align: left; white-space: normal; min-width: 14rem; max-width: 34rem; }
tr.ours th, tr.ours td { font-weight: 650; }
tr.tie td, tr.tie th { color: var(--muted); }
tr.beats td, tr.beats th { color: var(--alert); }
tr.none td, tr.none th { color: var(--muted); font-style: italic; }
tr.wrong td, tr.wrong th { color: var(--alert); font-style: italic; }
figure { margin: 0 0 1.5rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; padding: 1rem; }
figure img { display: block; width: 100%; min-width: 36rem; height: auto; }
figcaption { color: var(--muted); font-size: .9rem; margin-top: .8rem; max-width: 46rem; }
details { border: 1px solid var(--rule); border-radius: 10px; background: var(--card);
  margin: .8rem 0; padding: 0 1rem; }
summary { cursor: pointer; padding: .6rem 0; font-weight: 500; }
details > :last-child { margin-bottom: 1rem; }
pre.command { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  margin: 0; padding: .9rem 1rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0; }
dl.facts dt { color: var(--muted); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
ul { padding-left: 1.1rem; max-width: 46rem; }
li { margin-bottom: .35rem; }
@media (max-width: 40rem) { main { padding-top: 1.75rem; }
  th, td { padding-right: .8rem; } dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: .5rem; } }
@media print { details, figure { break-inside: avoid; } }
"""

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<link rel="icon" href="data:,">
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")

METHOD = (
    "No time without a right answer: value and gradients of every rival are first held against "
    "float64, with the plain formula in the same dtype as the yardstick. A wrong one is listed "
    "as wrong and has no number.",
    "Rivals take turns, round after round, each round in another order; fastssl runs twice a "
    "round, and how far it is from itself is the noise.",
    "Each call gets other copies of its inputs, as many as fill the last-level cache twice. CUDA "
    "events on a GPU, the performance counter on a CPU.",
    "p20, p50 and p80 are percentiles of the rounds. x is the median over the rounds of a "
    "rival's time over that of fastssl, with a 95 % interval from ranks alone; it is a tie when "
    "the interval holds 1 or x lies inside the noise.",
    "Peak memory is what a call holds beyond what was held before: the CUDA allocator's count, or "
    "on a CPU the high-water mark of a process of its own.",
    "The ceilings are a copy and a matrix product timed in the same run. FLOP/s and B/s count "
    "the operations and bytes the problem needs at least, the same for every rival, and the floor "
    "is the time they would take at those ceilings.",
)
