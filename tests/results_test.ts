/** Figures in documents: every result file that one quotes is of these kernels, or said to be of older ones. */

import { assert, assertMatch } from "@std/assert";
import { describe, it } from "@std/testing/bdd";
import { sourceHash } from "../src/backend/build.ts";

const root = new URL("../", import.meta.url);

async function list(folder: string, suffix: string): Promise<string[]> {
  const names: string[] = [];
  try {
    for await (const { name } of Deno.readDir(new URL(folder, root))) {
      if (name.endsWith(suffix)) names.push(folder + name);
    }
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
  return names.sort();
}

/** The documents that quote `result`, though its kernels are not `current`, and do not say so. */
export function outdated(
  result: { path: string; kernels: string },
  current: string,
  documents: ReadonlyMap<string, string>,
): string[] {
  if (result.kernels === current) return [];
  return [...documents].filter(([, text]) =>
    text.includes(result.path) && !text.includes("older kernels")
  ).map(([name]) => name);
}

describe("figures in documents", () => {
  it("come from result files of these kernels, or say 'older kernels'", async () => {
    const current = {
      cpu: await sourceHash("cpu"),
      cuda: await sourceHash("cuda"),
    };
    const documents = new Map<string, string>();
    for (
      const path of [...await list("", ".md"), ...await list("docs/", ".md")]
    ) {
      documents.set(path, await Deno.readTextFile(new URL(path, root)));
    }
    for (const path of await list("bench/results/", ".json")) {
      const result = JSON.parse(await Deno.readTextFile(new URL(path, root)));
      for (const field of ["kernels", "date", "command"]) {
        assertMatch(String(result[field]), /./, `${path} lacks ${field}`);
      }
      const library: keyof typeof current = result.library ?? "cpu";
      const stale = outdated({ path, ...result }, current[library], documents);
      assert(stale.length === 0, `${stale.join(", ")}: ${path} is outdated`);
    }
    for (const [name, text] of documents) {
      for (const [path] of text.matchAll(/bench\/results\/[\w.-]+\.json/g)) {
        await Deno.stat(new URL(path, root)).catch(() => {
          throw new Error(`${name} quotes ${path}, which is not there`);
        });
      }
    }
  });

  it("are found out when a result's kernels have changed", () => {
    const result = { path: "bench/results/x.json", kernels: "a" };
    const quoting = new Map([["README.md", "see bench/results/x.json"]]);
    const honest = new Map([["a.md", "bench/results/x.json, older kernels"]]);
    assert(outdated(result, "b", quoting).length === 1);
    assert(outdated(result, "a", quoting).length === 0);
    assert(outdated(result, "b", honest).length === 0);
  });
});
