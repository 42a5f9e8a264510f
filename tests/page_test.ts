/** Tests of reports in a browser: no page is wider than its window. They need Chromium (CHROMIUM, or on PATH) and say so when they skip. */

import { assert, assertEquals, assertMatch } from "@std/assert";
import { lineChart } from "../src/evaluate/chart.ts";
import { htmlReport } from "../src/evaluate/html.ts";
import { describe, it } from "@std/testing/bdd";

async function findChromium(): Promise<string | null> {
  const names = [
    Deno.env.get("CHROMIUM"),
    ...["chromium", "chromium-browser", "google-chrome"],
  ];
  for (const name of names) {
    if (!name) continue;
    try {
      const { success } = await new Deno.Command(name, {
        args: ["--version"],
        stdout: "null",
        stderr: "null",
      }).output();
      if (success) return name;
    } catch {
      // The next one.
    }
  }
  return null;
}

const chromium = await findChromium();
if (chromium === null) {
  console.warn("page_test.ts: skipped, there is no Chromium (CHROMIUM=...)");
}

/** Runs it on a page; gives what it prints. */
async function browse(url: string, ...args: string[]): Promise<string> {
  const profile = await Deno.makeTempDir({ prefix: "wkv-chromium-" });
  try {
    const output = await new Deno.Command(chromium!, {
      args: [
        ...["--headless", "--no-sandbox", "--disable-gpu"],
        ...[`--user-data-dir=${profile}`, "--virtual-time-budget=5000"],
        ...args,
        url,
      ],
      stderr: "null",
    }).output();
    assert(output.success, `chromium exited with ${output.code}`);
    return new TextDecoder().decode(output.stdout);
  } finally {
    await Deno.remove(profile, { recursive: true }).catch(() => {});
  }
}

const names = Array.from({ length: 9 }, (_, i) => `a policy's name ${i}`);
const page = htmlReport({
  title: "A title that is rather long, so that it takes more than one line",
  summary: "A sentence.",
  sections: [{
    heading: "Numbers",
    text: "W".repeat(30),
    table: {
      columns: ["policy", ...names],
      rows: Array.from(
        { length: 60 },
        (_, i) => [`row ${i}`, ...names.map((_, j) => i * 1000.125 + j)],
      ),
    },
    chart: lineChart({
      title: "A chart",
      xLabel: "x",
      yLabel: "y",
      series: names.map((name, i) => ({
        name,
        points: [{ x: 1, y: i }, { x: 2, y: 2 * i, error: 1 }],
      })),
    }),
  }],
  manifest: { hash: "0".repeat(400), note: "words ".repeat(100) },
});

describe("a report in Chromium", () => {
  const browsed = chromium === null ? it.skip : it;

  browsed("is never wider than its window, open or folded", async () => {
    // A frame of each width; scripts run in the frame around it alone.
    const frames = [360, 768, 1200].map((width) =>
      `<iframe style="width:${width}px;height:600px;border:0" srcdoc="${
        page.replaceAll("&", "&amp;").replaceAll('"', "&quot;")
          .replace("<details>", "<details open>")
      }"></iframe>`
    );
    const folder = await Deno.makeTempDir();
    await Deno.writeTextFile(
      `${folder}/frames.html`,
      `<!doctype html><body>${frames.join("")}<p id="found"></p><script>
        onload = () => document.getElementById("found").textContent = [
          ...document.querySelectorAll("iframe"),
        ].map((frame) => {
          const root = frame.contentDocument.documentElement;
          const table = frame.contentDocument.querySelector("table");
          return [root.scrollWidth, root.clientWidth, table.rows.length];
        }).join(" ");
      </script>`,
    );
    const dom = await browse(`file://${folder}/frames.html`, "--dump-dom");
    await Deno.remove(folder, { recursive: true });
    const found = /<p id="found">([\d, ]+)<\/p>/.exec(dom)![1]!.split(" ")
      .map((three) => three.split(",").map(Number));
    assertEquals(found.length, 3);
    found.forEach(([wide, window, rows], i) => {
      assert(wide! <= window!, `${wide} pixels in a window of ${window}`);
      assert(window! > [300, 700, 1100][i]!);
      assertEquals(rows, 61);
    });
  });

  browsed("prints", async () => {
    const folder = await Deno.makeTempDir();
    await Deno.writeTextFile(`${folder}/page.html`, page);
    await browse(
      `file://${folder}/page.html`,
      `--print-to-pdf=${folder}/page.pdf`,
    );
    const pdf = await Deno.readFile(`${folder}/page.pdf`);
    await Deno.remove(folder, { recursive: true });
    const text = new TextDecoder("latin1").decode(pdf);
    assertMatch(text, /^%PDF-/);
    const pages = text.match(/\/Type\s*\/Page\b/g)?.length ?? 0;
    assert(pages >= 2 && pages <= 8, `${pages} pages`);
  });
});
