/** The package: both configurations, what is published, and that it runs as it is served, with no file of the checkout. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertMatch,
} from "@std/assert";
import { afterAll, beforeAll, describe, it } from "@std/testing/bdd";
import { testModel } from "./model.ts";

const root = new URL("../", import.meta.url);

interface Config {
  imports: Record<string, string>;
  [key: string]: unknown;
}

async function config(name: string): Promise<Config> {
  return JSON.parse(await Deno.readTextFile(new URL(name, root)));
}

async function deno(
  args: readonly string[],
  options: { cwd?: string | URL; env?: Record<string, string> } = {},
): Promise<{ stdout: string; stderr: string }> {
  const { success, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [...args],
    cwd: options.cwd ?? root,
    env: { NO_COLOR: "1", ...options.env },
    stdin: "null",
    signal: AbortSignal.timeout(300_000),
  }).output();
  const text = new TextDecoder();
  const result = { stdout: text.decode(stdout), stderr: text.decode(stderr) };
  assert(success, `deno ${args.join(" ")}\n${result.stderr}`);
  return result;
}

/** The files that would be published, by path, as `deno publish` lists them. */
async function publishedFiles(): Promise<Map<string, Uint8Array<ArrayBuffer>>> {
  const { stdout, stderr } = await deno([
    "publish",
    "--dry-run",
    "--allow-dirty",
    "--no-check",
    "--config",
    "deno.json",
  ]);
  const files = new Map<string, Uint8Array<ArrayBuffer>>();
  for (
    const [, url] of `${stdout}\n${stderr}`.matchAll(
      /^\s+(file:\S+) \([\d.]+[KM]?B\)$/gm,
    )
  ) {
    assert(url!.startsWith(root.href), url!);
    const path = decodeURIComponent(url!.slice(root.href.length));
    files.set(path, await Deno.readFile(new URL(url!)));
  }
  return files;
}

/**
 * A module as it is served: `deno publish` replaces what the import map names
 * by what it is mapped to, in static and dynamic imports and in
 * import.meta.resolve.
 */
function unmapped(
  path: string,
  text: string,
  imports: Record<string, string>,
): string {
  const up = "../".repeat(path.split("/").length - 1) || "./";
  return text.replace(
    /(\bfrom\s*|\bimport\s*|\bimport\s*\(\s*|\bimport\.meta\.resolve\(\s*)"([^"]+)"/g,
    (whole, before: string, specifier: string) => {
      const target = imports[specifier];
      if (target === undefined) return whole;
      const address = target.startsWith("./") ? up + target.slice(2) : target;
      return `${before}"${address}"`;
    },
  );
}

describe("deno.jsr.json", () => {
  it("differs from deno.json in its imports only", async () => {
    const { imports: ours, ...npm } = await config("deno.json");
    const { imports: theirs, ...jsr } = await config("deno.jsr.json");
    assertEquals(
      jsr,
      npm,
      "Copy deno.json to deno.jsr.json, its imports left out",
    );
    assertEquals(Object.keys(theirs), Object.keys(ours));
    for (const [name, target] of Object.entries(ours)) {
      if (target.startsWith("npm:")) assertEquals(theirs[name], target);
      else assertMatch(theirs[name] ?? "", /^jsr:@std\/\w+@\^\d/, name);
    }
  });
});

describe("the package", () => {
  let files: Map<string, Uint8Array<ArrayBuffer>>;
  beforeAll(async () => {
    files = await publishedFiles();
  });

  it("has the entry points, the licence and the carried sources", () => {
    for (
      const path of [
        "mod.ts",
        "cli/main.ts",
        "deno.json",
        "LICENSE",
        "src/backend/sources.ts",
      ]
    ) assert(files.has(path), path);
  });

  it("has nothing else than the library and the command line", () => {
    const other = [...files.keys()].filter((path) =>
      !/^(src|cli|bench)\/[\w/]+(\.d)?\.ts$|^(mod\.ts|deno(\.jsr)?\.json|README\.md|LICENSE)$/
        .test(path) || /_test\.|tests|golden|bench\/(cpu|gpu|.*\/)/.test(path)
    );
    assertEquals(other, []);
  });

  it("is smaller than 2 MB", () => {
    const bytes = [...files.values()].reduce((sum, f) => sum + f.length, 0);
    assertGreater(bytes, 100_000);
    assertLess(bytes, 2_000_000);
  });

  it("names no folder of a machine and no package registry", () => {
    const found = [...files].flatMap(([path, bytes]) => {
      const text = new TextDecoder().decode(bytes);
      const match =
        /\/(work|root|home)\/|\.\.\/shared\b|\bfile:\/\/\/\w|\bregistry\.(?!ts\b)\w+\.\w|\bpypi\.\w|pythonhosted|npmmirror/
          .exec(text);
      return match ? [`${path}: ${match[0]}`] : [];
    });
    assertEquals(found, []);
  });
});

describe("the package as it is served", () => {
  let folder: string;
  let project: string;
  let server: Deno.HttpServer<Deno.NetAddr>;
  let origin: string;
  let env: Record<string, string>;
  const missing: string[] = [];

  beforeAll(async () => {
    const { imports } = await config("deno.json");
    const served = await publishedFiles();
    server = Deno.serve(
      { hostname: "127.0.0.1", port: 0, onListen: () => {} },
      (request) => {
        const path = decodeURIComponent(new URL(request.url).pathname.slice(1));
        const bytes = served.get(path);
        if (bytes === undefined) {
          missing.push(path);
          return new Response(null, { status: 404 });
        }
        if (!path.endsWith(".ts")) {
          return new Response(bytes, {
            headers: { "content-type": "application/json" },
          });
        }
        const text = new TextDecoder().decode(bytes);
        return new Response(unmapped(path, text, imports), {
          headers: { "content-type": "application/typescript" },
        });
      },
    );
    origin = `http://127.0.0.1:${server.addr.port}`;
    folder = await Deno.makeTempDir({ prefix: "wkv-package-" });
    project = `${folder}/project`;
    await Deno.mkdir(project);
    // The modules come from the server each time, the npm packages do not.
    const { npmCache } = JSON.parse((await deno(["info", "--json"])).stdout);
    await Deno.mkdir(`${folder}/deno`);
    await Deno.symlink(npmCache, `${folder}/deno/npm`);
    env = {
      DENO_DIR: `${folder}/deno`,
      XDG_CACHE_HOME: `${folder}/cache`,
      WKV_LIB_CPU: "",
    };
  });

  afterAll(async () => {
    await server.shutdown();
    await Deno.remove(folder, { recursive: true });
  });

  it("generates from an empty project, on a library built from the sources that it carries", async () => {
    const program = `
      import { generate, loadModel } from "${origin}/mod.ts";
      using model = await loadModel(Deno.args[0], { device: "cpu" });
      const tokens = [];
      for await (
        const piece of generate(model, "Once upon a time", { maxTokens: 8 })
      ) tokens.push(piece.token);
      console.log(JSON.stringify({ tokens, library: model.backend.path }));
    `;
    await Deno.writeTextFile(`${project}/main.ts`, program);
    const { stdout } = await deno(
      ["run", "-A", "--no-prompt", "main.ts", await testModel()],
      { cwd: project, env },
    );
    const { tokens, library } = JSON.parse(stdout);
    assertEquals(tokens.length, 8);
    assert(library.startsWith(`${folder}/cache/weightedkv/lib/`), library);
    assertEquals(missing, []);
  });

  it("has a command line that runs", async () => {
    const { stdout } = await deno(
      [
        "run",
        "-A",
        "--no-prompt",
        `${origin}/cli/main.ts`,
        "generate",
        "--help",
      ],
      { cwd: project, env },
    );
    assertMatch(stdout, /--budget/);
    assertEquals(missing, []);
  });
});
