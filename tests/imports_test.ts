/** Imports point down only, mod.ts does nothing when imported, and the registries list their whole folders. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertStringIncludes,
} from "@std/assert";
import { describe, it } from "@std/testing/bdd";

const root = new URL("../", import.meta.url);

/**
 * The layers, the highest first. A file is in the first layer that has its path
 * or its folder; it imports from lower layers and, in a folder, from beside it.
 */
const layers: readonly (readonly string[])[] = [
  ["cli/"],
  ["bench/"],
  ["mod.ts"],
  ["src/evaluate/"],
  ["src/chat.ts"],
  ["src/generate.ts"],
  ["src/session.ts", "src/plan.ts"],
  ["src/model.ts"],
  ["src/models/"],
  ["src/selftest/"],
  ["src/cache/"],
  ["src/backend/"],
  ["src/tokenizer/", "src/chat/", "src/hub/"],
  ["src/formats/", "src/user_cache.ts", "src/stop_strings.ts"],
  ["deno.json"],
];

/** What the lower layers import from below, and nothing else. */
const leaves: Readonly<Record<string, readonly string[]>> = {
  "src/backend/": ["src/formats/ggml_types.ts", "src/user_cache.ts"],
  "src/tokenizer/": ["src/formats/"],
  "src/chat/": ["src/formats/"],
  "src/hub/": ["src/formats/part_names.ts", "src/user_cache.ts"],
};

/** Files with what they import; true where one of the imports is static. */
type Graph = Map<string, Map<string, boolean>>;

interface Info {
  modules: {
    specifier: string;
    error?: string;
    dependencies?: { code?: Target; type?: Target; isDynamic?: boolean }[];
  }[];
}

interface Target {
  specifier?: string;
}

/** Every file below an entry point with the files that it imports, types included. */
async function graphOf(...entries: string[]): Promise<Graph> {
  const graph: Graph = new Map();
  for (const entry of entries) {
    const info: Info = JSON.parse(await deno(["info", "--json", entry]));
    for (const { specifier, error, dependencies = [] } of info.modules) {
      const from = local(specifier);
      if (from === null) continue;
      assertEquals(error, undefined, `${from}: ${error}`);
      const targets = graph.get(from) ?? new Map<string, boolean>();
      graph.set(from, targets);
      for (const { code, type, isDynamic } of dependencies) {
        for (const target of [code, type]) {
          const to = local(target?.specifier ?? "");
          if (to === null) continue;
          targets.set(to, targets.get(to) === true || !isDynamic);
        }
      }
    }
  }
  return graph;
}

/** A module's path below the root; null for packages. */
function local(specifier: string): string | null {
  return specifier.startsWith(root.href)
    ? specifier.slice(root.href.length)
    : null;
}

/** What a Deno process prints; it must end well. */
async function deno(
  args: readonly string[],
  env: Record<string, string> = {},
): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [...args],
    cwd: root,
    env: { NO_COLOR: "1", ...env },
  }).output();
  assert(success, new TextDecoder().decode(stderr));
  return new TextDecoder().decode(stdout);
}

/** The layer's number, 0 the highest, and the entry of the list. */
function place(path: string): { layer: number; name: string } {
  for (const [layer, names] of layers.entries()) {
    for (const name of names) {
      if (name.endsWith("/") ? path.startsWith(name) : path === name) {
        return { layer, name };
      }
    }
  }
  throw new RangeError(`${path} has no layer: add it to the list in this test`);
}

/** What is wrong with an import, or null. */
function fault(from: string, to: string): string | null {
  const upper = place(from);
  const lower = place(to);
  if (upper.name === lower.name) return null;
  if (lower.layer <= upper.layer) return `${from} imports ${to}, not below it`;
  const allowed = leaves[upper.name];
  if (allowed && !allowed.includes(lower.name) && !allowed.includes(to)) {
    return `${from} imports ${to}, but its folder may import only ${
      allowed.join(", ")
    }`;
  }
  return null;
}

/**
 * The first circle of static imports, or null. What is imported later, such as
 * a command from the list of commands, may look at the list.
 */
function circle(graph: Graph): string[] | null {
  const done = new Set<string>();
  const visit = (file: string, path: string[]): string[] | null => {
    if (path.includes(file)) return [...path.slice(path.indexOf(file)), file];
    if (done.has(file)) return null;
    for (const [next, isStatic] of graph.get(file) ?? []) {
      if (!isStatic) continue;
      const found = visit(next, [...path, file]);
      if (found) return found;
    }
    done.add(file);
    return null;
  };
  for (const file of graph.keys()) {
    const found = visit(file, []);
    if (found) return found;
  }
  return null;
}

/** The TypeScript files of a folder. */
async function filesIn(folder: string): Promise<string[]> {
  const names: string[] = [];
  for await (const { name } of Deno.readDir(new URL(folder, root))) {
    if (name.endsWith(".ts")) names.push(name);
  }
  return names.sort();
}

describe("imports", () => {
  it("point down only, without circles", async () => {
    const graph = await graphOf("mod.ts", "cli/main.ts");
    assertGreater(graph.size, 20);
    const faults = [...graph].flatMap(([from, targets]) =>
      [...targets.keys()].map((to) => fault(from, to)).filter((text) =>
        text !== null
      )
    );
    assertEquals(faults, []);
    assertEquals(circle(graph), null);
  });

  it("of every file under src start at mod.ts or the command line", async () => {
    const graph = await graphOf("mod.ts", "cli/main.ts");
    const unused: string[] = [];
    const walk = async (folder: string) => {
      for await (const entry of Deno.readDir(new URL(folder, root))) {
        const path = folder + entry.name;
        if (entry.isDirectory) await walk(`${path}/`);
        else if (path.endsWith(".ts") && !graph.has(path)) unused.push(path);
      }
    };
    await walk("src/");
    assertEquals(unused, []);
  });

  it("upward, sideways or circular would be noticed", () => {
    assert(fault("src/cache/cache.ts", "src/model.ts"));
    assert(fault("src/session.ts", "src/generate.ts"));
    assert(fault("src/backend/library.ts", "src/formats/gguf.ts"));
    assert(fault("src/formats/gguf.ts", "src/tokenizer/gguf.ts"));
    assertEquals(fault("cli/list.ts", "src/hub/models.ts"), null);
    assertEquals(fault("src/cache/cache.ts", "src/cache/policy.ts"), null);
    const graph: Graph = new Map([
      ["a.ts", new Map([["b.ts", true]])],
      ["b.ts", new Map([["c.ts", true]])],
      ["c.ts", new Map([["a.ts", false], ["b.ts", true]])],
    ]);
    assertEquals(circle(graph), ["b.ts", "c.ts", "b.ts"]);
  });
});

describe("importing mod.ts", () => {
  it("reads no file or variable and opens no library", async () => {
    // The log names what was asked for, what was refused and caught included.
    const log = await Deno.makeTempFile();
    try {
      await deno(["run", "--no-prompt", "mod.ts"], {
        DENO_AUDIT_PERMISSIONS: log,
      });
      assertEquals(await Deno.readTextFile(log), "");
      const code = 'try { Deno.env.get("HOME"); } catch {}';
      const file = `data:text/javascript,${encodeURIComponent(code)}`;
      await deno(["run", "--no-prompt", file], { DENO_AUDIT_PERMISSIONS: log });
      assertStringIncludes(await Deno.readTextFile(log), '"HOME"');
    } finally {
      await Deno.remove(log);
    }
  });
});

describe("a registry's mod.ts", () => {
  for (
    const { folder, helpers } of [
      { folder: "src/cache/policies/", helpers: [] as string[] },
      {
        folder: "src/models/",
        helpers: [
          "architecture.ts",
          "check.ts",
          "decoder.ts",
          "file.ts",
          "gguf_config.ts",
          "hugging_face.ts",
          "rope.ts",
          "weights.ts",
        ],
      },
    ]
  ) {
    it(`has one line for each file of ${folder}`, async () => {
      const text = await Deno.readTextFile(new URL(`${folder}mod.ts`, root));
      const listed = [
        ...text.matchAll(/^export (?:\*|\{ \w+ \}) from "\.\/([^"]+)";$/gm),
      ]
        .map(([, name]) => name!);
      const files = (await filesIn(folder)).filter((name) =>
        name !== "mod.ts" && !helpers.includes(name)
      );
      assertEquals(listed.sort(), files);
    });
  }
});
