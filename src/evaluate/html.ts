/** htmlReport(): one self-contained page of tables and charts, without a script or anything from elsewhere; used by the reports of runs. */

import { escapeText } from "./chart.ts";

/** A cell of a table; null is shown as a dash. */
export type Cell = string | number | null;

/** One part of a page. */
export interface ReportSection {
  /** Its heading. */
  heading: string;
  /** What it says; each line is a paragraph. */
  text?: string;
  /** Numbers are set to the right. */
  table?: {
    /** Headings of the columns. */
    columns: readonly string[];
    /** The rows. */
    rows: readonly (readonly Cell[])[];
  };
  /** An SVG of {@linkcode lineChart}. */
  chart?: string;
}

/** What a page holds. */
export interface ReportOptions {
  /** Its title. */
  title: string;
  /** A sentence or two below it. */
  summary: string;
  /** Its parts. */
  sections: readonly ReportSection[];
  /** How to make it again, shown folded at the end. */
  manifest: unknown;
}

const style = `
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #ffffff; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #dddddd; text-align: left; white-space: nowrap; }
.number { text-align: right; }
figure { margin: 1rem 0; }
svg { width: 100%; height: auto; }
pre { overflow-x: auto; background: #f5f5f5; padding: 1rem; font-size: 0.85rem; }
@media (prefers-color-scheme: dark) { body { color: #e8e8e8; background: #161616; } th, td { border-color: #444444; } pre { background: #242424; } }
@media print { body { color: #000000; background: #ffffff; margin: 0; max-width: none; } .scroll { overflow: visible; } pre { white-space: pre-wrap; overflow-wrap: anywhere; } h2, figure, tr { break-inside: avoid; } table { font-size: 0.7rem; } th, td { padding: 0.15rem 0.35rem; } }
`;

/** Puts a page together. */
export function htmlReport(options: ReportOptions): string {
  const { title, summary, sections, manifest } = options;
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escapeText(title)}</title>
<style>${style}</style>
</head>
<body>
<h1>${escapeText(title)}</h1>
${paragraphs(summary)}
${sections.map(section).join("\n")}
<details>
<summary>How it was made</summary>
<pre>${escapeText(JSON.stringify(manifest, null, 2))}</pre>
</details>
</body>
</html>
`;
}

function section({ heading, text, table, chart }: ReportSection): string {
  return [
    "<section>",
    `<h2>${escapeText(heading)}</h2>`,
    ...(text === undefined ? [] : [paragraphs(text)]),
    ...(chart === undefined ? [] : [`<figure>${chart}</figure>`]),
    ...(table === undefined ? [] : [
      '<div class="scroll"><table>',
      `<thead>${row("th", table.columns, table.rows[0])}</thead>`,
      `<tbody>${
        table.rows.map((cells) => row("td", cells, cells)).join("\n")
      }</tbody>`,
      "</table></div>",
    ]),
    "</section>",
  ].join("\n");
}

function paragraphs(text: string): string {
  return text.split("\n").map((line) => `<p>${escapeText(line)}</p>`).join(
    "\n",
  );
}

/** A row; what is a number in `like` is set to the right. */
function row(
  tag: "th" | "td",
  cells: readonly Cell[],
  like: readonly Cell[] = [],
): string {
  return `<tr>${
    cells.map((cell, i) => {
      const right = typeof like[i] === "number" || like[i] === null;
      return `<${tag}${right ? ' class="number"' : ""}>${
        cell === null ? "-" : escapeText(String(cell))
      }</${tag}>`;
    }).join("")
  }</tr>`;
}
