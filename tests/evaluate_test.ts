/** Tests of what runs leave behind: folders that go on, charts, pages, and their comparison. */

import {
  assert,
  assertEquals,
  assertMatch,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { lineChart } from "../src/evaluate/chart.ts";
import { htmlReport } from "../src/evaluate/html.ts";
import { type Manifest, RunFolder } from "../src/evaluate/run_folder.ts";
import { compareResults } from "../src/evaluate/verify.ts";
import { describe, it } from "@std/testing/bdd";

const manifest: Manifest = {
  command: "perplexity",
  options: { window: 32, policies: ["full"], budgets: [] },
  model: { name: "m", sha256: "00", bytes: 1 },
  text: null,
  versions: { weightedkv: "0", deno: "0", abi: 2, kernels: "00" },
  device: "CPU",
  created: "2026-01-01T00:00:00.000Z",
};

describe("RunFolder", () => {
  it("goes on with the same run, whatever the date, and with no other", async () => {
    const path = await Deno.makeTempDir();
    const folder = await RunFolder.open<object>(path, manifest);
    await folder.add([{ a: 1 }, { a: 2 }]);
    await folder.add([{ a: 3 }]);
    const later = { ...manifest, created: "2027-01-01T00:00:00.000Z" };
    const again = await RunFolder.open<object>(path, later);
    assertEquals(again.items, [{ a: 1 }, { a: 2 }, { a: 3 }]);
    assertEquals(again.manifest, manifest);
    const other = { ...manifest, options: { ...manifest.options, window: 64 } };
    await assertRejects(
      () => RunFolder.open(path, other),
      RangeError,
      "options.window is 32 there and 64 now",
    );
    await Deno.remove(path, { recursive: true });
  });

  it("drops a line that was cut off, and keeps what follows", async () => {
    const path = await Deno.makeTempDir();
    await (await RunFolder.open<object>(path, manifest)).add([{ a: 1 }]);
    const file = `${path}/results.jsonl`;
    await Deno.writeTextFile(file, '{"a":', { append: true });
    const folder = await RunFolder.open<object>(path, manifest);
    assertEquals(folder.items, [{ a: 1 }]);
    await folder.add([{ a: 2 }]);
    assertEquals(await Deno.readTextFile(file), '{"a":1}\n{"a":2}\n');
    await Deno.writeTextFile(file, "nonsense\n", { append: true });
    await assertRejects(
      () => RunFolder.read(path),
      SyntaxError,
      "line 3: Found what is not JSON",
    );
    await Deno.remove(path, { recursive: true });
  });

  it("refuses folders that hold something else", async () => {
    const path = await Deno.makeTempDir();
    await Deno.writeTextFile(`${path}/mine.txt`, "");
    await assertRejects(
      () => RunFolder.open(path, manifest),
      RangeError,
      '"mine.txt"',
    );
    await assertRejects(
      () => RunFolder.read(path),
      Deno.errors.NotFound,
      "no manifest.json",
    );
    await Deno.writeTextFile(`${path}/manifest.json`, "{}");
    await assertRejects(
      () => RunFolder.read(path),
      SyntaxError,
      'Found no "command"',
    );
    await Deno.remove(path, { recursive: true });
  });
});

describe("compareResults()", () => {
  const before = [
    { policy: "full", window: 0, nll: 100, kl: null, seconds: 1 },
    { policy: "full", window: 1, nll: 0.5, kl: 0.1, seconds: 2 },
  ];
  const change = (i: number, fields: object) =>
    before.map((item, at) => at === i ? { ...item, ...fields } : item);

  it("tells equal, close and different results apart", () => {
    const verdict = (after: object[]) => compareResults(before, after);
    assertEquals(verdict(change(1, { seconds: 9 })), {
      outcome: "equal",
      worst: 0,
      first: null,
    });
    const close = verdict(change(0, { nll: 100.001 }));
    assertEquals(close.outcome, "close");
    assertStringIncludes(close.first!, "result 1 (policy full");
    const different = verdict(change(1, { nll: 0.6, kl: null }));
    assertEquals(different.outcome, "different");
    assertStringIncludes(different.first!, "nll is 0.5 there and 0.6 now");
    assertEquals(verdict(before.slice(1)).outcome, "different");
    assertEquals(verdict(change(0, { policy: "x" })).outcome, "different");
  });

  it("names the first difference above the tolerance, not one below it", () => {
    const after = [{ ...before[0], nll: 100.001 }, { ...before[1], nll: 0.7 }];
    assertStringIncludes(compareResults(before, after).first!, "result 2");
  });
});

describe("lineChart()", () => {
  const series = [
    { name: "a", points: [{ x: 64, y: 30, error: 1 }, { x: 256, y: 20 }] },
    { name: '<b> & "c"', points: [{ x: 64, y: 25 }] },
  ];
  const draw = (more: object = {}) =>
    lineChart({ title: "T", xLabel: "X", yLabel: "Y", series, ...more });

  it("puts points where their numbers are", () => {
    const svg = draw({ xScale: "log" });
    const circles = [...svg.matchAll(/<circle cx="([\d.]+)" cy="([\d.]+)"/g)]
      .map(([, x, y]) => [Number(x), Number(y)] as const);
    assertEquals(circles.length, 3);
    const [[x0, y0], [x1, y1], [x2, y2]] = circles as [
      readonly [number, number],
      readonly [number, number],
      readonly [number, number],
    ];
    assert(x0 < x1 && y0 < y1, "left to right, downwards");
    assertEquals(x2, x0);
    assert(Math.abs((y0 + y1) / 2 - y2) < 0.11, "25 lies between 20 and 30");
    // Ticks enclose the error bar.
    const bar = /y1="([\d.]+)" y2="([\d.]+)" stroke="#0072b2"\/>/.exec(svg)!;
    assert(Math.abs((Number(bar[1]) + Number(bar[2])) / 2 - y0) < 0.11);
  });

  it("shows a height that is asked for", () => {
    assertEquals(draw().includes(">0</text>"), false);
    assertStringIncludes(draw({ base: 0 }), ">0</text>");
  });

  it("names places in full, as far as they have room", () => {
    const xs = Array.from({ length: 10 }, (_, i) => 256 << i);
    const points = xs.map((x) => ({ x, y: 1 }));
    const svg = draw({ xScale: "log", series: [{ name: "p", points }] });
    const ticks = [
      ...svg.matchAll(/x="([\d.]+)" y="384" text-anchor="middle">([\d,]+)</g),
    ].map(([, x, text]) => [Number(x), text!] as const);
    assertEquals(ticks.at(-1)![1], "131,072");
    assert(ticks.length >= 5, svg);
    for (const [i, [x, text]] of ticks.slice(1).entries()) {
      const [before, other] = ticks[i]!;
      // A letter takes 7 to 8 of these.
      assert(x - before > (text.length + other.length) / 2 * 7.5, text);
    }
  });

  it("names no place across that lies beyond the first and last points", () => {
    const points = Array.from({ length: 16 }, (_, i) => ({
      x: (i + 1) * 2048,
      y: 25 + i,
    }));
    const svg = draw({ series: [{ name: "p", points }] });
    const ticks = svg.matchAll(/y="384" text-anchor="middle">([\d,]+)</g);
    assertEquals([...ticks].map(([, text]) => text), [
      ...["10,000", "20,000", "30,000"],
    ]);
  });

  it("keeps room for the longest name, and draws a bound of a line", () => {
    const name = "a name of more letters than usual";
    const svg = draw({
      series: [
        { name, points: [{ x: 1, y: 2 }, { x: 2, y: 3 }] },
        {
          name: "least",
          bound: true,
          points: [{ x: 1, y: 1 }, { x: 2, y: 1 }],
        },
        { name: "other", points: [{ x: 1, y: 1 }] },
      ],
    });
    const at = new RegExp(`<text x="([\\d.]+)" y="[\\d.]+">${name}</text>`);
    assert(Number(at.exec(svg)![1]) + name.length * 7 <= 760);
    const lines = [...svg.matchAll(/<polyline .* stroke="([^"]+)".*\/>/g)];
    assertEquals(lines.map(([, colour]) => colour), ["#0072b2", "#0072b2"]);
    assertEquals(lines.map(([line]) => line.includes("dash")), [false, true]);
    assertEquals([...svg.matchAll(/<circle/g)].length, 3);
    assertStringIncludes(svg, `r="3.5" fill="#d55e00"`);
  });

  it("escapes names and draws single points, equal ones and none", () => {
    const svg = draw();
    assertStringIncludes(svg, "&lt;b&gt; &amp; &quot;c&quot;");
    assertEquals(svg.includes("<b>"), false);
    for (
      const points of [
        [],
        [{ x: 1, y: 5 }],
        [{ x: 1, y: 0 }, { x: 2, y: 0 }],
        [{ x: 0, y: -1e-9 }, { x: 1e6, y: 1e9 }],
      ]
    ) {
      const svg = draw({ series: [{ name: "p", points }] });
      assertEquals(/NaN|Infinity|undefined/.test(svg), false, svg);
    }
  });

  it("refuses what cannot be drawn", () => {
    const of = (point: object, more = {}) =>
      draw({ series: [{ name: "p", points: [point] }], ...more });
    assertThrows(() => of({ x: 1, y: NaN }), RangeError, "finite");
    assertThrows(
      () => of({ x: 0, y: 1 }, { xScale: "log" }),
      RangeError,
      "x above 0",
    );
  });
});

describe("htmlReport()", () => {
  it("is one page that needs nothing from elsewhere", () => {
    const page = htmlReport({
      title: "A <script>alert(1)</script>",
      summary: "One.\nTwo.",
      sections: [{
        heading: "H",
        table: { columns: ["name", "n"], rows: [["x<y", 1], ["z", null]] },
        chart: lineChart({ title: "", xLabel: "", yLabel: "", series: [] }),
      }],
      manifest: { note: "</pre><b>" },
    });
    assertEquals(
      /<script|<link|<img|https?:(?!\/\/www\.w3\.org)/.test(page),
      false,
    );
    assertStringIncludes(page, "<p>One.</p>\n<p>Two.</p>");
    assertStringIncludes(page, '<td>x&lt;y</td><td class="number">1</td>');
    assertStringIncludes(page, '<td class="number">-</td>');
    assertStringIncludes(page, "&lt;/pre&gt;&lt;b&gt;");
    assertMatch(page, /^<!doctype html>/);
    // What is opened is closed.
    const open: string[] = [];
    for (
      const [tag, slash, name] of page.matchAll(/<(\/?)([a-z0-9]+)[^>]*>/g)
    ) {
      if (tag.endsWith("/>") || ["meta"].includes(name!)) continue;
      if (slash) assertEquals(open.pop(), name);
      else open.push(name!);
    }
    assertEquals(open, []);
  });
});
