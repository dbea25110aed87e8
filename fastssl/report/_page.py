"""The report's page: its one template and its style sheet.  Nothing is loaded from elsewhere."""

from string import Template

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --ink: #1f2933;
  --muted: #5f6b76; --rule: #e3e6ea; --accent: #0072b2; --bar: #cfe3f0; --quiet: #e6e8eb;
  --alert: #a32b00; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #121416; --card: #1a1a1a; --ink: #e4e7ea; --muted: #9aa5b0; --rule: #2d3237;
    --accent: #6cb8e6; --bar: #1f4a63; --quiet: #33383d; --alert: #ff9d78; }
  img.chart { filter: invert(0.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { font-size: 1.05rem; font-weight: 600; margin: 0 0 .6rem; color: var(--muted); }
.headline { font-size: clamp(1.35rem, 3.4vw, 1.9rem); line-height: 1.3; font-weight: 600;
  letter-spacing: -.01em; margin: 0 0 2rem; text-wrap: pretty; }
h2 { font-size: 1.1rem; margin: 3rem 0 .9rem; }
.problem { border-left: 3px solid var(--alert); padding: .1rem .9rem; color: var(--alert); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .6rem .9rem .6rem 0; text-align: right; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--rule); }
th { font-size: .82rem; font-weight: 500; color: var(--muted); }
tbody th { font-size: 1rem; color: var(--ink); font-weight: 400; }
th:first-child { text-align: left; }
tr.ours th, tr.ours td { font-weight: 650; }
.bar { display: block; height: 5px; margin-top: 5px; border-radius: 3px; margin-left: auto;
  width: 6.5rem; background: linear-gradient(90deg, var(--fill) var(--share), var(--quiet) 0);
  --fill: var(--muted); }
tr.ours .bar { --fill: var(--accent); }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr));
  gap: 1.2rem 1rem; margin: 0; }
dl.facts div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
dl.facts dt { font-size: .82rem; line-height: 1.35; color: var(--muted); }
dl.facts dd { margin: 0; font-size: 1.2rem; font-weight: 600; white-space: nowrap; }
figure { margin: 0 0 1.5rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; padding: 1rem; }
figure img { display: block; width: 100%; height: auto; }
img.wide { min-width: 42rem; }
img.sheet { width: auto; max-width: 100%; max-height: 34rem; margin: 0 auto; object-fit: contain; }
figcaption { color: var(--muted); font-size: .9rem; margin-top: .8rem; max-width: 46rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.pair figure { max-width: 34rem; }
.note { color: var(--muted); font-size: .9rem; }
details { border: 1px solid var(--rule); border-radius: 10px; background: var(--card);
  margin-bottom: .8rem; }
summary { cursor: pointer; padding: .7rem 1rem; font-weight: 500; }
pre { margin: 0; padding: .9rem 1rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; }
details pre { border-top: 1px solid var(--rule); }
pre.command { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
ul.versions { list-style: none; padding: 0; margin: .8rem 0 0; display: flex; flex-wrap: wrap;
  gap: .3rem 1.2rem; color: var(--muted); font-size: .9rem; }
@media (max-width: 40rem) { main { padding-top: 1.75rem; } .bar { width: 4.2rem; }
  th, td { padding-right: .7rem; } }
@media print { details { break-inside: avoid; } figure { break-inside: avoid; } }
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
