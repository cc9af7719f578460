"""The page's style sheet. Colours: Okabe and Ito's palette, darker on light paper and lighter on dark."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2024; --muted: #5d666f; --rule: #d9dee3; --panel: #f6f7f9;
  --blue: #0072b2; --green: #00795a; --vermilion: #c24e00; --purple: #9a4f82; --heat: #0072b2; --want: #ffe9b8;
  --given: #d7e9f7; }
@media (prefers-color-scheme: dark) { :root { --page: #15181b; --ink: #e4e7ea; --muted: #9aa4ad; --rule: #343a40;
  --panel: #1d2125; --blue: #56b4e9; --green: #35c79b; --vermilion: #f08a4b; --purple: #d69ac0; --heat: #3c9bd6;
  --want: #5c4710; --given: #143f5c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 28px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 12px; }
h2 { font-size: 21px; line-height: 1.3; margin: 0 0 14px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 16px; margin: 22px 0 6px; }
h4 { font-size: 13px; margin: 0 0 2px; }
h4 span { display: block; font-weight: 400; color: var(--muted); }
p { margin: 0 0 10px; max-width: 92ch; text-wrap: pretty; }
h2 + figure h3, h2 + h3 { margin-top: 0; }
section { margin-top: 44px; }
figure { margin: 0 0 26px; min-width: 0; }
figcaption, .note, small { color: var(--muted); font-size: 13px; max-width: 92ch; display: block; }
.headline { font-size: 17px; max-width: 88ch; margin-bottom: 22px; }
nav { font-size: 13px; margin-top: 16px; }
nav a { color: var(--blue); text-decoration: none; margin-right: 14px; white-space: nowrap; }
nav a:hover { text-decoration: underline; }
code, pre { font: 12.5px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--panel); margin: 0; padding: 10px 12px; overflow-x: auto; tab-size: 4; }
pre.command { margin-bottom: 18px; white-space: pre-wrap; }
details pre { max-height: 420px; overflow: auto; margin-top: 8px; }
details { margin-top: 18px; } summary { cursor: pointer; }

.flow { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 8px; list-style: none;
  margin: 0; padding: 0; }
.flow li { background: var(--panel); border-top: 3px solid var(--blue); padding: 8px 8px 10px; min-width: 0; }
.flow h3 { font-size: 13px; margin: 0; color: var(--muted); font-weight: 600; }
.flow h3::before { content: counter(stage) ". "; counter-increment: stage; } .flow { counter-reset: stage; }
.flow .figure { margin: 2px 0 8px; line-height: 1.25; }
.flow b { font-size: 21px; font-weight: 600; display: block; white-space: nowrap; }
.flow .figure span { font-size: 12px; color: var(--muted); }
dl { margin: 0; } dd { margin: 0; font-variant-numeric: tabular-nums; }
.flow dl { font-size: 12px; } .flow dd { margin-left: auto; } .flow dt { color: var(--muted); }
.flow dl div { display: flex; flex-wrap: wrap; justify-content: space-between; column-gap: 4px; }

.scroll { overflow-x: auto; margin-bottom: 10px; }
table { border-collapse: collapse; font-size: 13.5px; }
th, td { padding: 5px 18px 5px 0; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--rule); }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
td { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }

.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 8px 48px; }
.columns svg { max-width: 480px; }
.columns figure h3 { margin-top: 0; }
.columns > dl { font-size: 13.5px; align-self: start; }
.columns > dl div { display: flex; justify-content: space-between; gap: 16px; padding: 5px 0;
  border-bottom: 1px solid var(--rule); }
.columns dt { color: var(--muted); } .columns dd { text-align: right; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(225px, 100%), 1fr)); gap: 18px 28px;
  margin: 10px 0; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 16px 20px;
  margin: 10px 0 24px; }
article { min-width: 0; border: 1px solid var(--rule); display: flex; flex-direction: column; }
article pre { flex: 1; max-height: 320px; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: isolate; }
.answer { display: flex; gap: 10px; padding: 6px 12px; font-size: 13px; align-items: baseline; }
.answer span { color: var(--muted); white-space: nowrap; } .answer code { white-space: pre-wrap; overflow-wrap: anywhere; }
.head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 10px; padding: 6px 12px; font-size: 13px;
  overflow-wrap: anywhere; }
.head code { min-width: 0; white-space: pre-wrap; }
.verdict { margin-left: auto; color: var(--vermilion); font-weight: 600; white-space: nowrap; }
.verdict.good { color: var(--green); }
.why { padding: 6px 12px; font-size: 12.5px; color: var(--muted); overflow-wrap: anywhere; }
mark { color: inherit; } mark.want { background: var(--want); } mark.given { background: var(--given); }
.squares { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 2px 20px; font-size: 13px;
  margin-bottom: 14px; }
.squares div { display: flex; gap: 10px; align-items: center; min-width: 0; }
.squares span { white-space: nowrap; line-height: 1; } .squares code { overflow: hidden; text-overflow: ellipsis; }
.box { display: inline-block; width: 11px; height: 11px; margin-right: 3px; border: 1px solid var(--muted); }
.box.passed { background: var(--green); border-color: var(--green); }

svg { display: block; width: 100%; height: auto; }
svg svg { overflow: hidden; }
text { fill: var(--ink); font-size: 12px; font-variant-numeric: tabular-nums; }
.tick { fill: var(--muted); } .label { font-weight: 600; } .event { font-weight: 400; }
.mesh { stroke: var(--rule); stroke-width: 1; } .axis { stroke: var(--muted); }
.border { stroke: var(--muted); stroke-dasharray: 2 3; } .phase { stroke: var(--muted); stroke-opacity: .6; }
.reference { stroke: var(--muted); stroke-dasharray: 5 4; }
.curve { fill: none; stroke-linejoin: round; } .strong { stroke-width: 2.2; } .curve.faint { stroke-width: 1;
  stroke-opacity: .45; }
.curve.dashed { stroke-dasharray: 6 4; stroke-width: 1.8; } .jump { stroke: var(--muted); stroke-width: 1.2; }
polyline.s0 { stroke: var(--blue); } polyline.s1 { stroke: var(--green); } polyline.s2 { stroke: var(--vermilion); }
polyline.s3 { stroke: var(--purple); }
.dot.s0, text.s0 { fill: var(--blue); } .dot.s1, text.s1 { fill: var(--green); }
.dot.s2, text.s2 { fill: var(--vermilion); } .dot.s3, text.s3 { fill: var(--purple); }
.dot.hollow { fill: var(--page); stroke: var(--green); stroke-width: 1.5; }
.cells { image-rendering: pixelated; } .heat { fill: var(--heat); }
.fill.kept { fill: var(--blue); } .fill.dropped { fill: var(--vermilion); }
.rule { stroke-width: 3; } .rule.kept { stroke: var(--blue); } .rule.dropped { stroke: var(--vermilion); }
.shard { fill-opacity: .3; } .g0 { fill: var(--blue); } .g1 { fill: var(--green); } .g2 { fill: var(--vermilion); }
.g3 { fill: var(--purple); }

.legend { font-size: 13px; color: var(--muted); margin-bottom: 4px; }
.legend span { margin-right: 20px; white-space: nowrap; }
.key { display: inline-block; width: 22px; height: 0; margin-right: 7px; vertical-align: middle;
  border-top: 3px solid var(--ink); }
.key.faint { border-top-width: 1px; } .key.dashed { border-top-style: dashed; border-top-width: 2px; }
.key.kept { border-color: var(--blue); } .key.s0 { border-color: var(--blue); } .key.s1 { border-color: var(--green); }
.key.s2 { border-color: var(--vermilion); } .key.s3 { border-color: var(--purple); }
.key.dropped { border-color: var(--vermilion); }
.key.ramp { width: 90px; height: 11px; border: 0;
  background: linear-gradient(90deg, rgb(0 114 178), rgb(0 114 178 / 0) 50%, rgb(213 94 0 / 0) 50%, rgb(213 94 0)); }
@media (max-width: 900px) { .flow { grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); }
  figure > svg text { font-size: 14px; } .columns svg text { font-size: 12px; } }
@media print { main { max-width: none; } article, figure { break-inside: avoid; } }
"""
