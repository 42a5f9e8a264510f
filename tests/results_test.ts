/** Figures in documents: every result file that one quotes is of these kernels or candidates, or said to be of older ones. */

import { assert, assertEquals, assertMatch, assertThrows } from "@std/assert";
import { describe, it } from "@std/testing/bdd";
import { createHash } from "node:crypto";
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

/** The hash of the experiment in torch, as bench/candidates/run.py makes it. */
async function torchHash(): Promise<string> {
  const hash = createHash("sha256");
  for (const path of await list("bench/candidates/", ".py")) {
    hash.update(await Deno.readFile(new URL(path, root)));
  }
  return hash.digest("hex");
}

/** What a result of `library` was made with: that of the kernels, or "torch" and its version. */
export function madeWith(
  library: string | undefined,
): "cpu" | "cuda" | "torch" {
  if (library?.startsWith("torch ")) return "torch";
  if (library === undefined || library === "cpu") return "cpu";
  assert(library === "cuda", `unknown library ${library}`);
  return library;
}

/** The documents that quote `result`, though what made it is not `current`, and do not say so. */
export function outdated(
  result: { path: string; kernels: string; library?: string },
  current: string,
  documents: ReadonlyMap<string, string>,
): string[] {
  if (result.kernels === current) return [];
  const words = madeWith(result.library) === "torch"
    ? "older candidates"
    : "older kernels";
  return [...documents].filter(([, text]) =>
    text.includes(result.path) && !text.includes(words)
  ).map(([name]) => name);
}

describe("figures in documents", () => {
  it("come from result files of these kernels, or say 'older kernels' or 'older candidates'", async () => {
    const current = {
      cpu: await sourceHash("cpu"),
      cuda: await sourceHash("cuda"),
      torch: await torchHash(),
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
      const now = current[madeWith(result.library)];
      const stale = outdated({ path, ...result }, now, documents);
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

  it("of an experiment in torch are held against its own files", () => {
    assertEquals(madeWith("torch 2.11.0+cu130"), "torch");
    assertEquals(["cuda", "cpu", undefined].map(madeWith), [
      ...["cuda", "cpu", "cpu"],
    ]);
    assertThrows(() => madeWith("torchless"), Error, "unknown library");
    const path = "bench/results/x.json";
    const result = { path, kernels: "a", library: "torch 2.11.0" };
    const of = (text: string) => new Map([["a.md", `${path}, ${text}`]]);
    assertEquals(outdated(result, "a", of("")), []);
    assertEquals(outdated(result, "b", of("older kernels")), ["a.md"]);
    assertEquals(outdated(result, "b", of("older candidates")), []);
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
