/** Names, pulls and the cache of the Hugging Face Hub, beside a Hub made up here that cuts, lies, stalls and sends elsewhere. */

import {
  assert,
  assertEquals,
  assertMatch,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { afterAll, beforeAll, describe, it } from "@std/testing/bdd";
import { createHash } from "node:crypto";
import { loadModel } from "../mod.ts";
import {
  chooseFiles,
  formatHubName,
  isWhole,
  parseHubName,
} from "../src/hub/huggingface.ts";
import {
  describeModel,
  listModels,
  type ModelOptions,
  type Progress,
  pullModel,
  removeModel,
  resolveModel,
} from "../src/hub/models.ts";
import { ok } from "./cli_process.ts";
import { tinyModel } from "./tiny_model.ts";

let root = "";
let count = 0;
beforeAll(async () => {
  root = await Deno.makeTempDir({ prefix: "wkv_hf_" });
});
afterAll(async () => {
  await Deno.remove(root, { recursive: true });
});

function fresh(name: string): string {
  return `${root}/${name}${count++}`;
}

const CONTENT = new Uint8Array(300_000).map((_, i) => i * 7919 >> 3);
const COMMIT = "a".repeat(40), LATER = "b".repeat(40);

function sha256(data: Uint8Array): string {
  return createHash("sha256").update(data).digest("hex");
}

/** The name that git has for a file. */
function gitSha1(data: Uint8Array): string {
  return createHash("sha1").update(`blob ${data.length}\0`).update(data)
    .digest("hex");
}

/** A file of the made-up Hub, and what it does wrong. */
interface Served {
  data: Uint8Array<ArrayBuffer>;
  /** Its hash as the Hub states it, of a large file the sha256. @default the right one */
  hash?: string;
  /** Is kept as git keeps small files. */
  small?: boolean;
  /** Breaks off after so many bytes, this many times. */
  cut?: { after: number; times: number };
  /** Sends so many bytes and then nothing. */
  stall?: number;
  /** Sends more than it said. */
  more?: boolean;
}

/** A small Hub: `org/repo`, whose revision `main` is a commit. */
class FakeHub implements AsyncDisposable {
  files: Record<string, Served> = {};
  commit = COMMIT;
  /** What all questions are answered with. */
  status = 200;
  /** Answers whole files to requests for the rest. */
  ignoresRange = false;
  /** Where files are sent for. */
  elsewhere: string | null = null;
  readonly requests: {
    path: string;
    range: string | null;
    token: string | null;
  }[] = [];
  #hung: ReadableStreamDefaultController[] = [];
  readonly #server = Deno.serve(
    {
      port: 0,
      hostname: "127.0.0.1",
      onListen() {},
      onError: () => new Response(null, { status: 500 }),
    },
    (request) => this.#answer(request),
  );

  get url(): string {
    return `http://127.0.0.1:${this.#server.addr.port}`;
  }

  #answer({ url, headers }: Request): Response {
    const { pathname } = new URL(url);
    const range = headers.get("range");
    const token = headers.get("authorization");
    this.requests.push({ path: pathname, range, token });
    if (this.status !== 200) return new Response(null, { status: this.status });
    if (
      /^\/api\/models\/org\/repo\/revision\/(main|refs%2Fpr%2F1|a{40})$/.test(
        pathname,
      )
    ) {
      return Response.json({ sha: this.commit });
    }
    if (pathname === `/api/models/org/repo/tree/${this.commit}`) {
      return Response.json(
        Object.entries(this.files).map(([path, { data, hash, small }]) => ({
          type: "file",
          path,
          size: data.length,
          oid: small ? hash ?? gitSha1(data) : "0".repeat(40),
          ...small ? {} : {
            lfs: {
              oid: hash ?? sha256(data),
              size: data.length,
              pointerSize: 100,
            },
          },
        })),
      );
    }
    const [, path = ""] =
      new RegExp(`^/org/repo/resolve/${this.commit}/(.+)$`).exec(pathname) ??
        [];
    const file = this.files[path];
    if (file === undefined) return new Response(null, { status: 404 });
    if (this.elsewhere !== null) {
      const location = `${this.elsewhere}${pathname}`;
      return new Response(null, { status: 302, headers: { location } });
    }
    const from = range === null || this.ignoresRange
      ? 0
      : Number(/^bytes=(\d+)-$/.exec(range)![1]);
    const data = file.data.slice(from);
    const init: ResponseInit = from === 0 ? {} : {
      status: 206,
      headers: {
        "content-range": `bytes ${from}-${
          file.data.length - 1
        }/${file.data.length}`,
      },
    };
    if (file.more) return new Response(new Uint8Array([...data, 1, 2]), init);
    const { cut, stall } = file;
    const cuts = cut !== undefined && cut.times-- > 0;
    if (!cuts && stall === undefined) return new Response(data, init);
    const body = new ReadableStream({
      start: (controller) => {
        controller.enqueue(data.slice(0, cuts ? cut.after : stall));
        if (!cuts) this.#hung.push(controller);
      },
      async pull(controller) {
        if (!cuts) return await new Promise(() => {});
        await new Promise((resolve) => setTimeout(resolve, 20));
        controller.error(new Error("cut"));
      },
    });
    return new Response(body, init);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const controller of this.#hung) {
      try {
        controller.close();
      } catch {
        // The client is gone.
      }
    }
    await this.#server.shutdown();
  }
}

/** Options of a cache of its own, whose waits are short. */
function optionsOf(hub: FakeHub): ModelOptions & { hubCache: string } {
  return {
    cacheDir: fresh("cache"),
    hubCache: fresh("hub"),
    hubUrl: hub.url,
    retryMs: 1,
    stallMs: 300,
  };
}

async function fails(
  pull: Promise<unknown>,
  ...texts: string[]
): Promise<Error> {
  const error = await assertRejects(() => pull, Error);
  for (const text of texts) assertStringIncludes(error.message, text);
  return error;
}

/** Every path below a folder but locks, links with where they lead. */
async function tree(folder: string): Promise<string[]> {
  const all: string[] = [];
  for await (const { name, isDirectory, isSymlink } of Deno.readDir(folder)) {
    const path = `${folder}/${name}`;
    if (isDirectory) all.push(...await tree(path));
    else if (isSymlink) all.push(`${path} -> ${await Deno.readLink(path)}`);
    else if (!name.endsWith(".lock")) all.push(path);
  }
  return all.sort();
}

describe("hf: names", () => {
  it("are taken apart and put together again", () => {
    for (
      const [name, repo, revision, file] of [
        ["hf:org/repo", "org/repo", "main", null],
        ["hf:o_r.g/a-b:x.gguf", "o_r.g/a-b", "main", "x.gguf"],
        ["hf:org/repo@v1.0", "org/repo", "v1.0", null],
        ["hf:org/repo:Q4_K_M", "org/repo", "main", "Q4_K_M"],
        ["hf:org/repo@refs/pr/1:q/x.gguf", "org/repo", "refs/pr/1", "q/x.gguf"],
      ] as const
    ) {
      const parsed = parseHubName(name);
      assertEquals(parsed, { repo, revision, file });
      assertEquals(formatHubName(parsed), name);
    }
  });

  it("can't lead out of the cache", () => {
    for (
      const name of [
        ...["hf:", "hf:repo", "hf:/repo", "hf:../repo", "hf:org/.."],
        ...["hf:org/.repo", "hf:org/a--b", "hf:org/repo/x.gguf"],
        ...["hf:org/repo@", "hf:org/repo@..", "hf:org/repo@a/../b"],
        ...["hf:org/repo@/a", "hf:org/repo:", "hf:org/repo:../x.gguf"],
        ...["hf:org/repo:/x.gguf", "hf:org/repo:a//x.gguf"],
        ...["hf:org/repo:a/./x.gguf", "hf:org/repo:.x.gguf"],
        ...["hf:org/repo:x\n.gguf", "hf:org/repo:x?.gguf"],
        `hf:org/repo:${"x".repeat(200)}.gguf`,
        `hf:${"x".repeat(97)}/repo`,
      ]
    ) assertThrows(() => parseHubName(name), RangeError, "hf:org/repo[@");
    assertThrows(
      () => parseHubName("hf:org/repo:model.bin"),
      RangeError,
      "model.bin is neither a .gguf file nor a quant",
    );
  });

  it("mean a file, a quant, the only file, or a folder", () => {
    const ggufs = [
      "m-Q4_K_M.gguf",
      "m-Q4_K_S.gguf",
      "q/m.q8_0.gguf",
      "README.md",
    ];
    const choose = (name: string, files: string[]) =>
      chooseFiles(parseHubName(`hf:o/r${name}`), files);
    const one = (open: string) => ({ open, files: [open] });
    assertEquals(choose(":q4_k_m", ggufs), one("m-Q4_K_M.gguf"));
    assertEquals(choose(":Q8_0", ggufs), one("q/m.q8_0.gguf"));
    assertEquals(choose(":m-Q4_K_S.gguf", ggufs), one("m-Q4_K_S.gguf"));
    assertEquals(choose("", ["a.gguf", "b.txt"]), one("a.gguf"));
    const folder = [
      ...["config.json", "model-00001-of-00002.safetensors"],
      ...["model-00002-of-00002.safetensors", "model.safetensors.index.json"],
      ...["tokenizer.json", "pytorch_model.bin", "x/model.safetensors"],
    ];
    const files = [
      ...["config.json", "tokenizer.json", "model.safetensors.index.json"],
      ...folder.slice(1, 3),
    ];
    assertEquals(choose("", folder), { open: null, files });
    assert(isWhole(choose("", folder), files));
    assert(!isWhole(choose("", folder), files.slice(0, -1)));
    const refused: [string, string[], string][] = [
      ["", ggufs, "3 such .gguf files, name one of them: m-Q4_K_M.gguf"],
      [":Q4", ggufs, "has no Q4, but m-Q4_K_M.gguf"],
      [":x.gguf", ggufs, "has no x.gguf, but"],
      ["", ["config.json"], "neither a .gguf file nor config.json with"],
    ];
    for (const [name, listed, text] of refused) {
      assertThrows(() => choose(name, listed), RangeError, text);
    }
  });
});

describe("hf: names of models in several files", () => {
  const part = (stem: string, part: number, of = 3) =>
    `${stem}-0000${part}-of-0000${of}.gguf`;
  const parts = (stem: string) => [1, 2, 3].map((i) => part(stem, i));
  const choose = (name: string, files: string[]) =>
    chooseFiles(parseHubName(`hf:o/r${name}`), files);

  it("mean all of them, and open the first", () => {
    const listed = [
      ...parts("q/m-Q8_0").toReversed(),
      ...["m-Q4_K_M.gguf", "README.md"],
    ];
    const all = {
      open: "q/m-Q8_0-00001-of-00003.gguf",
      files: parts("q/m-Q8_0"),
    };
    assertEquals(choose(":q8_0", listed), all);
    assertEquals(choose(`:${all.open}`, listed), all);
    assertEquals(choose("", parts("q/m-Q8_0")), all);
    assert(isWhole(all, listed));
  });

  it("are refused where they mean a later part, or one is missing", () => {
    const refused: [string, string[], string][] = [
      [
        `:${part("m", 2)}`,
        parts("m"),
        "part 2 of a model in 3 files, name the first: m-00001-of-00003.gguf",
      ],
      [":Q8_0", parts("m-Q8_0").slice(0, 2), "has no m-Q8_0-00003-of-00003"],
      [":Q8_0", parts("m-Q8_0").slice(1), "has no m-Q8_0-00001-of-00003"],
      [
        "",
        [...parts("a"), "b.gguf"],
        "2 such .gguf files, name one of them: a-00001-of-00003.gguf, b.gguf",
      ],
      [
        "",
        [...parts("a"), part("a", 1, 2), part("a", 2, 2)],
        "name one of them: a-00001-of-00002.gguf, a-00001-of-00003.gguf",
      ],
      ["", [part("a", 1, 0), "b.gguf"], "2 such .gguf files"],
      ["", ["a-00001-of-99999.gguf"], "split into 99999 files"],
    ];
    for (const [name, listed, text] of refused) {
      assertThrows(() => choose(name, listed), RangeError, text);
    }
  });
});

describe("pull from the Hub", () => {
  it("gets a model in several files, which loads, is listed once and removed whole", async () => {
    await using hub = new FakeHub();
    const tiny = tinyModel({ layers: 3 });
    const files = tiny.split(3).map((data, i) => {
      const file = `q/m-F32-0000${i + 1}-of-00003.gguf`;
      hub.files[file] = { data };
      return file;
    });
    hub.files["q/other-Q4_0.gguf"] = { data: CONTENT };
    const options = optionsOf(hub);
    const folder = `${options.hubCache}/models--org--repo`;
    const path = await resolveModel("hf:org/repo:F32", options);
    assertEquals(path, `${folder}/snapshots/${COMMIT}/${files[0]}`);
    const asked = hub.requests.map(({ path }) => path).filter((path) =>
      path.includes("/resolve/")
    );
    assertEquals(asked.length, 3);
    using model = await loadModel("hf:org/repo:F32", {
      ...options,
      cacheDir: undefined,
      offline: true,
    });
    assertEquals(model.config.layers, 3);
    const bytes = tiny.split(3).reduce((sum, { length }) => sum + length, 0);
    const name = `hf:org/repo:${files[0]}`;
    assertEquals(await listModels(options), [
      { name, path, bytes, revision: COMMIT },
    ]);
    const details = await describeModel(name, options);
    assertEquals(
      details.files.map(({ path }) => path),
      files.map((file) => `${folder}/snapshots/${COMMIT}/${file}`),
    );
    // A part that is gone is pulled again, and nothing else.
    await Deno.remove(details.files[1]!.path);
    await Deno.remove(`${folder}/blobs/${details.files[1]!.hash}`);
    assertEquals(await listModels(options), []);
    await assertRejects(
      () => resolveModel("hf:org/repo:F32", { ...options, offline: true }),
      Deno.errors.NotFound,
    );
    hub.requests.length = 0;
    assertEquals(await resolveModel("hf:org/repo:F32", options), path);
    assertEquals(
      hub.requests.filter(({ path }) => path.includes("/resolve/")).map((
        { path },
      ) => path),
      [`/org/repo/resolve/${COMMIT}/${files[1]}`],
    );
    assertEquals(await removeModel("hf:org/repo:F32", options), bytes);
    assertEquals(await tree(options.hubCache), []);
  });

  it("fills the Hub's cache as its own clients do", async () => {
    await using hub = new FakeHub();
    const config = new TextEncoder().encode("{}");
    hub.files = {
      "q/x-Q4_0.gguf": { data: CONTENT },
      "config.json": { data: config, small: true },
    };
    const options = optionsOf(hub);
    const reports: Progress[] = [];
    const path = await resolveModel("hf:org/repo@refs/pr/1:Q4_0", {
      ...options,
      onProgress: (report) => reports.push(report),
    });
    const folder = `${options.hubCache}/models--org--repo`;
    const hash = sha256(CONTENT);
    assertEquals(path, `${folder}/snapshots/${COMMIT}/q/x-Q4_0.gguf`);
    assertEquals(await tree(options.hubCache), [
      `${folder}/blobs/${hash}`,
      `${folder}/refs/refs/pr/1`,
      `${path} -> ../../../blobs/${hash}`,
    ]);
    assertEquals(await Deno.readFile(path), CONTENT);
    assertEquals(await Deno.readTextFile(`${folder}/refs/refs/pr/1`), COMMIT);
    const loaded = reports.filter(({ stage }) => stage === "download");
    loaded.reduce((before, { loaded, total }) => {
      assert(loaded >= before && total === CONTENT.length);
      return loaded;
    }, 0);
    assertEquals(loaded.at(-1)!.loaded, CONTENT.length);
    // What is there is found without the Hub, by branch and by commit.
    const asked = hub.requests.length;
    for (
      const name of [
        "hf:org/repo@refs/pr/1:Q4_0",
        `hf:org/repo@${COMMIT}:q/x-Q4_0.gguf`,
        `hf:org/repo@${COMMIT}`,
      ]
    ) {
      assertEquals(
        await resolveModel(name, { ...options, offline: true }),
        path,
      );
    }
    assertEquals(hub.requests.length, asked);
    await assertRejects(
      () => resolveModel("hf:org/repo:Q4_0", { ...options, offline: true }),
      Deno.errors.NotFound,
      "pull hf:org/repo",
    );
  });

  it("takes what another client put there", async () => {
    const hubCache = fresh("hub");
    const folder = `${hubCache}/models--org--repo`;
    const snapshot = `${folder}/snapshots/${COMMIT}`;
    for (const part of ["blobs", "refs", `snapshots/${COMMIT}`]) {
      await Deno.mkdir(`${folder}/${part}`, { recursive: true });
    }
    await Deno.writeTextFile(`${folder}/refs/main`, COMMIT);
    await Deno.writeFile(`${folder}/blobs/abc`, CONTENT);
    await Deno.symlink("../../blobs/abc", `${snapshot}/x.gguf`);
    await Deno.symlink("../../blobs/gone", `${snapshot}/y.gguf`);
    const path = await resolveModel("hf:org/repo", { hubCache, offline: true });
    assertEquals(path, `${snapshot}/x.gguf`);
    const options = { hubCache, cacheDir: fresh("cache") };
    assertEquals(await listModels(options), [{
      name: "hf:org/repo:x.gguf",
      path,
      bytes: CONTENT.length,
      revision: COMMIT,
    }]);
  });

  it("removes a link to elsewhere, and leaves what it leads to", async () => {
    const hubCache = fresh("hub"), elsewhere = fresh("own.gguf");
    const folder = `${hubCache}/models--org--repo`;
    const snapshot = `${folder}/snapshots/${COMMIT}`;
    for (const part of ["blobs", "refs", `snapshots/${COMMIT}`]) {
      await Deno.mkdir(`${folder}/${part}`, { recursive: true });
    }
    await Deno.writeTextFile(`${folder}/refs/main`, COMMIT);
    await Deno.writeFile(elsewhere, CONTENT);
    await Deno.symlink(elsewhere, `${snapshot}/x.gguf`);
    await Deno.writeFile(`${snapshot}/y.gguf`, CONTENT.slice(5));
    const options = { hubCache, cacheDir: fresh("cache") };
    const { files } = await describeModel("hf:org/repo:x.gguf", options);
    assertEquals(files.map(({ hash }) => hash), [null]);
    assertEquals(await removeModel("hf:org/repo:x.gguf", options), 0);
    assertEquals(
      await removeModel("hf:org/repo:y.gguf", options),
      CONTENT.length - 5,
    );
    assertEquals(await tree(hubCache), []);
    assertEquals(await Deno.readFile(elsewhere), CONTENT);
  });

  it("gets a folder that loads, with every file that it needs", async () => {
    const source = new URL("golden/models/llama/", import.meta.url).pathname;
    await using hub = new FakeHub();
    for (const file of ["config.json", "model.safetensors"]) {
      const data = await Deno.readFile(`${source}${file}`);
      hub.files[file] = { data, small: file === "config.json" };
    }
    hub.files["README.md"] = { data: CONTENT, small: true };
    const options = optionsOf(hub);
    const reports: Progress[] = [];
    const path = await pullModel("hf:org/repo", {
      ...options,
      onProgress: (report) => reports.push(report),
    });
    // Each report is of one file and of all; both end where they should.
    const sizes = ["config.json", "model.safetensors"].map((file) =>
      hub.files[file]!.data.length
    );
    const all = sizes[0]! + sizes[1]!;
    const seen = [0, 0];
    let before = 0;
    for (const { stage, label, loaded, total, file } of reports) {
      assertEquals([label, total], ["hf:org/repo", all]);
      assert(loaded >= before, `${loaded} after ${before}`);
      before = loaded;
      const { index, count, name } = file!;
      assertEquals([count, file!.total], [2, sizes[index - 1]]);
      assertEquals(name, ["config.json", "model.safetensors"][index - 1]);
      if (stage === "download") seen[index - 1] = file!.loaded;
      else assertEquals(loaded, index === 1 ? sizes[0] : all);
    }
    assertEquals([seen, before], [sizes, all]);
    assertEquals(path.split("/").at(-1), COMMIT);
    const files = (await describeModel("hf:org/repo", options)).files;
    assertEquals(files.map(({ path: file }) => file.slice(path.length + 1)), [
      "config.json",
      "model.safetensors",
    ]);
    const [model] = await listModels(options);
    assertEquals([model!.name, model!.path], ["hf:org/repo", path]);
    using loaded = await loadModel("hf:org/repo", {
      ...options,
      cacheDir: undefined,
      offline: true,
    });
    assertEquals(loaded.config.architecture, "llama");
  });

  it("says each file's end on a pipe, and nothing when quiet", async () => {
    await using hub = new FakeHub();
    hub.files = {
      "config.json": { data: new TextEncoder().encode("{}"), small: true },
      "model-00001-of-00002.safetensors": { data: CONTENT },
      "model-00002-of-00002.safetensors": { data: CONTENT.slice(9) },
      "model.safetensors.index.json": { data: CONTENT.slice(99), small: true },
    };
    const hubCache = fresh("hub");
    const env = { HF_ENDPOINT: hub.url, HF_HUB_CACHE: hubCache, HF_TOKEN: "" };
    const pull = await ok(["pull", "hf:org/repo"], { env });
    assertMatch(
      pull.stderr.replace(/ in [\d.]+ m?s/g, ""),
      new RegExp(`^Downloading hf:org/repo \\(4 files, 879 KiB\\)
config.json \\(1 of 4\\): 2 B
model-00001-of-00002.safetensors \\(2 of 4\\): 293 KiB
model-00002-of-00002.safetensors \\(3 of 4\\): 293 KiB
model.safetensors.index.json \\(4 of 4\\): 293 KiB
Downloaded hf:org/repo
$`),
    );
    const path = `${hubCache}/models--org--repo/snapshots/${COMMIT}`;
    assertEquals(pull.stdout, `${path}\n`);
    // Of what is here one line a file, and no download.
    const again = await ok(["pull", "hf:org/repo"], { env });
    assertEquals(again.stdout, pull.stdout);
    assertMatch(
      again.stderr,
      /^(hf:org\/repo: \S+ \(\d of 4\): already there, hash verified\n){4}$/,
    );
    await Deno.remove(`${path}/../../blobs/${sha256(CONTENT)}`);
    const one = await ok(["pull", "hf:org/repo"], { env });
    assertMatch(
      one.stderr,
      /\nDownloading hf:org\/repo \(4 files, 879 KiB\)\nmodel-00001-of-00002.safetensors \(2 of 4\): 293 KiB in [\d.]+ m?s\nhf:org/,
    );
    await Deno.remove(hubCache, { recursive: true });
    const quiet = await ok(["pull", "hf:org/repo", "--quiet"], { env });
    assertEquals([quiet.stdout, quiet.stderr], [pull.stdout, ""]);
  });

  it("goes on where a download broke off", async () => {
    await using hub = new FakeHub();
    const cut = { after: 100_000, times: 2 };
    hub.files["x.gguf"] = { data: CONTENT, cut };
    const options = optionsOf(hub);
    const path = await pullModel("hf:org/repo", options);
    assertEquals(await Deno.readFile(path), CONTENT);
    const ranges = hub.requests.filter(({ path }) => path.includes("/resolve/"))
      .map(({ range }) => range);
    assertEquals(ranges, [null, "bytes=100000-", "bytes=200000-"]);
  });

  it("keeps what came when it gives up, and the next pull goes on", async () => {
    await using hub = new FakeHub();
    hub.files["x.gguf"] = { data: CONTENT, stall: 1000 };
    const options = optionsOf(hub);
    await fails(
      pullModel("hf:org/repo", { ...options, stallMs: 50 }),
      "sent nothing for 0.05 s",
      "5000 of its 300000 bytes are here, and the next pull goes on",
    );
    hub.files["x.gguf"] = { data: CONTENT };
    hub.requests.length = 0;
    const path = await pullModel("hf:org/repo", options);
    assertEquals(await Deno.readFile(path), CONTENT);
    assertEquals(hub.requests.at(-1)!.range, "bytes=5000-");
  });

  it("begins again where the rest is not to be had, or was of no use", async () => {
    await using hub = new FakeHub();
    hub.ignoresRange = true;
    hub.files["x.gguf"] = { data: CONTENT, cut: { after: 1000, times: 1 } };
    const options = optionsOf(hub);
    assertEquals(
      await Deno.readFile(await pullModel("hf:org/repo", options)),
      CONTENT,
    );
    const other = optionsOf(hub);
    const blobs = `${other.hubCache}/models--org--repo/blobs`;
    await Deno.mkdir(blobs, { recursive: true });
    const part = `${blobs}/${sha256(CONTENT)}.incomplete`;
    hub.ignoresRange = false;
    for (const wrong of [new Uint8Array(500), new Uint8Array(400_000)]) {
      await Deno.writeFile(part, wrong);
      const path = await pullModel("hf:org/repo", other);
      assertEquals(await Deno.readFile(path), CONTENT);
      await removeModel("hf:org/repo", other);
      await Deno.mkdir(blobs, { recursive: true });
    }
  });

  it("refuses what is not what the Hub said", async () => {
    await using hub = new FakeHub();
    const options = optionsOf(hub);
    hub.files["x.gguf"] = { data: CONTENT, hash: "1".repeat(64) };
    await fails(
      pullModel("hf:org/repo", options),
      `its sha256 is ${sha256(CONTENT)}, it should be ${"1".repeat(64)}`,
      "removed",
    );
    hub.files["x.gguf"] = { data: CONTENT, small: true, hash: "2".repeat(40) };
    await fails(pullModel("hf:org/repo", options), "its sha1 is", "2222");
    hub.files["x.gguf"] = { data: CONTENT, more: true };
    await fails(
      pullModel("hf:org/repo", options),
      "does not end after the expected 300000 bytes",
    );
    assertEquals(await listModels(options), []);
    // Nor does the Hub choose a place outside.
    hub.files = { "../../../x.gguf": { data: CONTENT } };
    await assertRejects(
      () => pullModel("hf:org/repo", options),
      RangeError,
      "no path below a folder",
    );
  });

  it("verifies what is there, and takes the commit that a branch is now", async () => {
    await using hub = new FakeHub();
    hub.files["x.gguf"] = { data: CONTENT };
    const options = optionsOf(hub);
    const notes: string[] = [];
    const noting = {
      ...options,
      onProgress: ({ note }: Progress) => {
        if (note !== undefined) notes.push(note);
      },
    };
    const path = await pullModel("hf:org/repo", noting);
    await pullModel("hf:org/repo", noting);
    assertEquals(notes, ["hf:org/repo:x.gguf: already there, hash verified"]);
    await Deno.writeFile(path, new Uint8Array(CONTENT.length));
    await pullModel("hf:org/repo", noting);
    assertMatch(notes[1]!, /^Removed .* \(its sha256 is/);
    assertEquals(await Deno.readFile(path), CONTENT);
    // Another commit lies beside it, the file they share once.
    hub.commit = LATER;
    hub.files["y.gguf"] = { data: CONTENT.slice(5) };
    await pullModel("hf:org/repo:x.gguf", options);
    await pullModel("hf:org/repo:y.gguf", options);
    assertEquals(
      (await listModels(options)).map(({ name, revision }) => [name, revision]),
      [
        [`hf:org/repo:x.gguf`, LATER],
        [`hf:org/repo:y.gguf`, LATER],
        [`hf:org/repo@${COMMIT}:x.gguf`, COMMIT],
      ],
    );
    await assertRejects(
      () => resolveModel("hf:org/repo", options),
      RangeError,
      "name one of them: x.gguf, y.gguf",
    );
    // What another revision has is not removed with one.
    assertEquals(await removeModel("hf:org/repo:x.gguf", options), 0);
    assertEquals(
      await removeModel(`hf:org/repo@${COMMIT}`, options),
      CONTENT.length,
    );
    assertEquals(
      await removeModel("hf:org/repo:y.gguf", options),
      CONTENT.length - 5,
    );
    assertEquals(await tree(options.hubCache), []);
    await assertRejects(
      () => removeModel("hf:org/repo", options),
      RangeError,
      "No such model is here",
    );
  });

  it("sends the token to the Hub alone", async () => {
    await using hub = new FakeHub();
    await using other = new FakeHub();
    hub.files["x.gguf"] = other.files["x.gguf"] = { data: CONTENT };
    hub.elsewhere = other.url;
    const options = optionsOf(hub);
    Deno.env.set("HF_TOKEN", "hf_secret");
    Deno.env.set("HF_ENDPOINT", hub.url);
    try {
      const path = await pullModel("hf:org/repo", {
        ...options,
        hubUrl: undefined,
      });
      assertEquals(await Deno.readFile(path), CONTENT);
      assertEquals(
        new Set(hub.requests.map(({ token }) => token)),
        new Set(["Bearer hf_secret"]),
      );
      assertEquals(other.requests.map(({ token }) => token), [null]);
      Deno.env.set("HF_TOKEN", "secret");
      const error = await assertRejects(
        () => pullModel("hf:org/repo", options),
        RangeError,
        "HF_TOKEN",
      );
      assert(!error.message.includes("secret"));
    } finally {
      Deno.env.delete("HF_TOKEN");
      Deno.env.delete("HF_ENDPOINT");
    }
    hub.elsewhere = hub.url;
    hub.files["x.gguf"] = { data: CONTENT.slice(1) };
    await fails(pullModel("hf:org/repo", options), "redirects without end");
  });

  it("says what to check when the Hub refuses or is out of reach", async () => {
    await using hub = new FakeHub();
    const options = optionsOf(hub);
    for (
      const [status, text] of [[404, "404"], [403, "HF_TOKEN"], [
        429,
        "asks to wait",
      ], [500, "500"]] as const
    ) {
      hub.status = status;
      await fails(pullModel("hf:org/repo", options), "hf:org/repo: ", text);
    }
    hub.status = 200;
    await fails(
      pullModel("hf:org/repo@gone", options),
      "no such repository or revision",
    );
    await fails(
      pullModel("hf:org/repo", {
        ...options,
        fetch: () => Promise.reject(new TypeError("error sending request")),
      }),
      "could not be asked (error sending request)",
    );
    await assertRejects(
      () => pullModel("hf:org/repo", { ...options, hubUrl: "ftp://x" }),
      RangeError,
      "ftp://x",
    );
  });

  it("can be aborted, and lets a second pull wait", async () => {
    await using hub = new FakeHub();
    hub.files["x.gguf"] = { data: CONTENT, stall: 1000 };
    const options = optionsOf(hub);
    const abort = new AbortController();
    const notes: string[] = [];
    const first = pullModel("hf:org/repo", {
      ...options,
      stallMs: 60_000,
      signal: abort.signal,
      onProgress: () => {
        hub.files["x.gguf"] = { data: CONTENT };
      },
    });
    while (hub.files["x.gguf"]!.stall !== undefined) {
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
    const second = pullModel("hf:org/repo", {
      ...options,
      onProgress: ({ note }) => {
        if (note === undefined) return;
        notes.push(note);
        abort.abort();
      },
    });
    const error = await assertRejects(() => first, DOMException);
    assertEquals(error.name, "AbortError");
    assertEquals(await Deno.readFile(await second), CONTENT);
    assertMatch(notes[0]!, /Another pull of org\/repo is running/);
  });
});
