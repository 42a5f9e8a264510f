/** The safetensors reader: the named bad files S01 to S40, what must be taken, shards, and mutations. */

import {
  assert,
  assertEquals,
  assertInstanceOf,
  assertRejects,
  assertStringIncludes,
} from "@std/assert";
import { afterAll, beforeAll, describe, it } from "@std/testing/bdd";
import { FormatError } from "../src/formats/error.ts";
import { JsonError, parseJson } from "../src/formats/json.ts";
import { SafetensorsFile } from "../src/formats/safetensors.ts";
import { rawSafetensors, safetensors } from "./safetensors_writer.ts";

let folder = "";
let written = 0;

beforeAll(async () => {
  folder = await Deno.makeTempDir({ prefix: "safetensors_test_" });
});
afterAll(async () => {
  await Deno.remove(folder, { recursive: true });
});

/** Writes bytes to a new file and returns its path. */
async function write(
  bytes: Uint8Array | string,
  name = `${written++}.safetensors`,
): Promise<string> {
  const path = `${folder}/${name}`;
  const data = typeof bytes === "string"
    ? new TextEncoder().encode(bytes)
    : bytes;
  await Deno.writeFile(path, data);
  return path;
}

/** Writes a model of several files into a folder of its own; returns the index. */
async function shards(
  map: Record<string, unknown>,
  files: Record<string, Uint8Array>,
): Promise<string> {
  const name = `shards${written++}`;
  await Deno.mkdir(`${folder}/${name}`);
  for (const [file, bytes] of Object.entries(files)) {
    await write(bytes, `${name}/${file}`);
  }
  const index = JSON.stringify({
    metadata: { total_size: 8 },
    weight_map: map,
  });
  return await write(index, `${name}/model.safetensors.index.json`);
}

const one = (data = new Uint8Array(4)) => ({ dtype: "F32", shape: [1], data });

/** An entry of a header; `more` replaces or adds members as JSON text. */
const entry = (more: Record<string, string> = {}): string => {
  const all = {
    dtype: '"F32"',
    shape: "[1]",
    data_offsets: "[0,4]",
    ...more,
  };
  return `{${Object.entries(all).map(([k, v]) => `"${k}":${v}`).join(",")}}`;
};
const FOUR = new Uint8Array(4);
/** A file whose only tensor has these members. */
const tensor = (more: Record<string, string>, bytes = 4): Uint8Array =>
  rawSafetensors(`{"t":${entry(more)}}`, new Uint8Array(bytes));

/** `[test name, file, field, part of the message]` of files to refuse. */
const BAD: readonly (readonly [string, () => Uint8Array, string, string])[] = [
  ["S01 an empty file", () => new Uint8Array(), "header length", "empty"],
  [
    "S02 7 bytes",
    () => new Uint8Array(7),
    "header length",
    "Data cut short: expected 8 bytes from byte 0, the file ends at byte 7",
  ],
  [
    "S03 a header of 0 bytes",
    () => rawSafetensors(""),
    "header",
    "Header is empty",
  ],
  [
    "S04 a header of 2^64 - 1 bytes",
    () => rawSafetensors("{}", FOUR, 2n ** 64n - 1n),
    "header length",
    "Found 18446744073709551615 bytes, expected at most 100000000",
  ],
  [
    "S05 a header of 100,000,001 bytes",
    () => rawSafetensors("{}", FOUR, 100_000_001n),
    "header length",
    "Found 100000001 bytes, expected at most 100000000",
  ],
  [
    "S06 a header beyond the file's end",
    () => rawSafetensors("{}", new Uint8Array(), 3n),
    "header length",
    "Data cut short: found 3 bytes, but 2 are left",
  ],
  [
    "S07 a header that is not UTF-8",
    () => rawSafetensors(Uint8Array.of(0x7b, 0x22, 0xff, 0x22, 0x7d)),
    "header",
    "not valid UTF-8",
  ],
  [
    "S08 a header that is a list",
    () => rawSafetensors("[]"),
    "header",
    "Found a list, expected an object",
  ],
  [
    "S09 truncated JSON",
    () => rawSafetensors('{"t":{"dtype":"F32"'),
    'tensor "t"',
    'Found the end of the text at character 19, expected "," or "}"',
  ],
  [
    "S10 two JSON values",
    () => rawSafetensors("{}{}"),
    "header",
    'Found "{" behind the value at character 2',
  ],
  [
    "S12 a byte order mark",
    () => rawSafetensors("\ufeff{}"),
    "header",
    "Found a byte order mark at character 0",
  ],
  [
    "S13 a duplicate tensor name",
    () =>
      rawSafetensors(
        `{"t":${entry()},"t":${entry({ data_offsets: "[4,8]" })}}`,
        new Uint8Array(8),
      ),
    'tensor "t"',
    "The key comes twice",
  ],
  [
    "S14 a duplicate name of an empty range",
    () =>
      rawSafetensors(
        `{"t":${
          entry({ shape: "[0]", data_offsets: "[0,0]" })
        },"t":${entry()}}`,
        FOUR,
      ),
    'tensor "t"',
    "The key comes twice",
  ],
  [
    "S15 a duplicate dtype",
    () => rawSafetensors(`{"t":{"dtype":"F16",${entry().slice(1)}}`, FOUR),
    'tensor "t" dtype',
    "The key comes twice",
  ],
  [
    "S16 dtype F12",
    () => tensor({ dtype: '"F12"' }),
    'tensor "t" dtype',
    'Found "F12", expected one of BOOL',
  ],
  [
    "S16 a dtype that is a number",
    () => tensor({ dtype: "7" }),
    'tensor "t" dtype',
    "Found 7",
  ],
  [
    "S17 shape [4.0]",
    () => tensor({ shape: "[4.0]" }),
    'tensor "t" shape 0',
    "The number is 4.0 at character",
  ],
  [
    "S18 shape [1e3]",
    () => tensor({ shape: "[1e3]" }),
    'tensor "t" shape 0',
    "The number is 1e3 at character",
  ],
  [
    "S18 shape [-0]",
    () => tensor({ shape: "[-0]" }),
    'tensor "t" shape 0',
    "The number is -0 at character",
  ],
  [
    "S19 shape [-1]",
    () => tensor({ shape: "[-1]" }),
    'tensor "t" shape',
    "Holds -1, expected whole numbers of 0 or more",
  ],
  [
    "S20 a shape whose product is 2^64",
    () => tensor({ shape: "[4294967296,4294967296]" }),
    'tensor "t" shape',
    "is too large",
  ],
  [
    "S20 a product that a zero would hide",
    () => tensor({ shape: "[4294967296,4294967296,0]" }),
    'tensor "t" shape',
    "is too large",
  ],
  [
    "S21 a size in bits that wraps",
    () => tensor({ dtype: '"F64"', shape: "[288230376151711,1]" }),
    'tensor "t" shape',
    "values of 64 bits are too large",
  ],
  [
    "S22 reversed offsets",
    () => tensor({ data_offsets: "[4,0]" }),
    'tensor "t" data_offsets',
    "Ends at 0, expected at least 4",
  ],
  [
    "S23 overlapping tensors",
    () =>
      rawSafetensors(
        `{"a":${entry({ shape: "[2]", data_offsets: "[0,8]" })},"b":${
          entry({ data_offsets: "[4,8]" })
        }}`,
        new Uint8Array(8),
      ),
    'tensor "b" data_offsets',
    "Begins at 4, expected 8",
  ],
  [
    "S23 two tensors in one place",
    () => rawSafetensors(`{"a":${entry()},"b":${entry()}}`, FOUR),
    'tensor "b" data_offsets',
    "Begins at 0, expected 4",
  ],
  [
    "S24 a hole between tensors",
    () =>
      rawSafetensors(
        `{"a":${entry()},"b":${entry({ data_offsets: "[8,12]" })}}`,
        new Uint8Array(12),
      ),
    'tensor "b" data_offsets',
    "Begins at 8, expected 4",
  ],
  [
    "S24 a hole before the first tensor",
    () => tensor({ data_offsets: "[4,8]" }, 8),
    'tensor "t" data_offsets',
    "Begins at 4, expected 0",
  ],
  [
    "S25 data past the file's end",
    () => tensor({ shape: "[2]", data_offsets: "[0,8]" }),
    'tensor "t" data_offsets',
    "Data cut short: ends at byte",
  ],
  [
    "S26 bytes behind the last tensor",
    () => tensor({}, 5),
    "data",
    "expected the file's end at byte",
  ],
  [
    "S27 a size that is not its shape's",
    () => tensor({ shape: "[2]" }),
    'tensor "t" data_offsets',
    "Holds 4 bytes, expected 8: its shape is [2] of F32",
  ],
  [
    "S28 F4 with an odd count",
    () => tensor({ dtype: '"F4"', shape: "[3]", data_offsets: "[0,2]" }, 2),
    'tensor "t" shape',
    "no whole number of bytes",
  ],
  [
    "S30 a name with a NUL",
    () => rawSafetensors(`{"a\\u0000b":${entry()}}`, FOUR),
    "header",
    'name "a\\u0000b" holds a control character',
  ],
  [
    "S30 an empty name",
    () => rawSafetensors(`{"":${entry()}}`, FOUR),
    "header",
    "has 0 bytes, expected 1 to 512",
  ],
  [
    "S30 a name of 513 bytes",
    () => rawSafetensors(`{"${"n".repeat(513)}":${entry()}}`, FOUR),
    "header",
    "has 513 bytes, expected 1 to 512",
  ],
  [
    "S31 __metadata__ that is not of strings",
    () => rawSafetensors('{"__metadata__":{"a":1}}'),
    '__metadata__ "a"',
    "Found 1, expected a string",
  ],
  [
    "S31 __metadata__ that is a string",
    () => rawSafetensors('{"__metadata__":"a"}'),
    "__metadata__",
    'Found "a", expected an object',
  ],
  [
    "S32 200,001 tensors",
    () =>
      rawSafetensors(
        `{${
          Array.from(
            { length: 200_001 },
            (_, i) =>
              `"${i}":${entry({ shape: "[0]", data_offsets: "[0,0]" })}`,
          ).join(",")
        }}`,
      ),
    "header",
    "Found 200001 tensors, expected at most 200000",
  ],
  [
    "S32 200,002 entries",
    () =>
      rawSafetensors(
        `{${Array.from({ length: 200_002 }, (_, i) => `"${i}":0`).join(",")}}`,
      ),
    "header",
    "More than 200001 entries",
  ],
  [
    "S33 10,000 levels",
    () => rawSafetensors("[".repeat(10_000) + "]".repeat(10_000)),
    'tensor "0" 0 0',
    "Nested deeper than 3 levels",
  ],
  [
    "S34 an offset of 2^53 + 1",
    () => tensor({ data_offsets: "[0,9007199254740993]" }),
    'tensor "t" data_offsets 1',
    "The number is 9007199254740993 at character",
  ],
  [
    "no data_offsets",
    () => rawSafetensors('{"t":{"dtype":"F32","shape":[1]}}', FOUR),
    'tensor "t" data_offsets',
    "Found nothing, expected a list of integers",
  ],
  [
    "three offsets",
    () => tensor({ data_offsets: "[0,4,4]" }),
    'tensor "t" data_offsets',
    "Found 3 numbers, expected 2",
  ],
  [
    "9 dimensions",
    () => tensor({ shape: "[1,1,1,1,1,1,1,1,1]" }),
    'tensor "t" shape',
    "Found 9 dimensions, expected at most 8",
  ],
  [
    "half of a surrogate pair in a name",
    () => rawSafetensors(`{"\\ud800":${entry()}}`, FOUR),
    "header",
    "half of a surrogate pair",
  ],
];

describe("SafetensorsFile.open refuses", () => {
  for (const [name, bytes, field, message] of BAD) {
    it(name, async () => {
      const path = await write(bytes());
      const error = await assertRejects(
        () => SafetensorsFile.open(path),
        FormatError,
      );
      assertEquals(error.field, field);
      assertEquals(error.file, path);
      assertStringIncludes(error.message, message);
    });
  }

  it("S36 a file that shrinks after it was opened, when it is read", async () => {
    const path = await write(safetensors({ t: one() }));
    using file = await SafetensorsFile.open(path);
    await Deno.truncate(path, file.size - 2);
    const { offset, file: data } = file.tensor("t", [1]);
    await assertRejects(
      () => data.read(offset, new Uint8Array(4)),
      FormatError,
      "Data cut short: the file ends at byte",
    );
  });

  it("S37 an index that names a missing file", async () => {
    const path = await shards({ a: "a.safetensors", b: "b.safetensors" }, {
      "a.safetensors": safetensors({ a: one() }),
    });
    const error = await assertRejects(
      () => SafetensorsFile.open(path),
      FormatError,
    );
    assertEquals(error.file, path);
    assertStringIncludes(error.message, '"b.safetensors", which is missing');
  });

  for (
    const name of [
      "../x.safetensors",
      "/etc/x.safetensors",
      "a/b.safetensors",
      "..safetensors",
      "x.bin",
      "a\\b.safetensors",
      7,
    ]
  ) {
    it(`S38 an index that names ${name}`, async () => {
      const path = await shards({ a: name }, {});
      const error = await assertRejects(
        () => SafetensorsFile.open(path),
        FormatError,
      );
      assertEquals(error.field, 'weight_map "a"');
      assertStringIncludes(error.message, "in the same folder");
    });
  }

  it("S39 a tensor in two files", async () => {
    const path = await shards({ a: "a.safetensors", b: "b.safetensors" }, {
      "a.safetensors": safetensors({ a: one() }),
      "b.safetensors": safetensors({ b: one(), a: one() }),
    });
    const error = await assertRejects(
      () => SafetensorsFile.open(path),
      FormatError,
    );
    assertEquals(error.field, 'tensor "a"');
    assertStringIncludes(error.message, "expected it once");
  });

  it("an index whose file does not hold the tensor", async () => {
    const path = await shards({ a: "a.safetensors", b: "a.safetensors" }, {
      "a.safetensors": safetensors({ a: one() }),
    });
    const error = await assertRejects(
      () => SafetensorsFile.open(path),
      FormatError,
    );
    assertEquals(error.field, 'weight_map "b"');
    assertStringIncludes(error.message, "which does not hold it");
  });

  it("an index without a map, or with an empty one", async () => {
    for (const text of ["{}", '{"weight_map":[]}', '{"weight_map":{}}', "["]) {
      const path = await write(text, `${written++}.index.json`);
      await assertRejects(() => SafetensorsFile.open(path), FormatError);
    }
  });

  it("a path to nothing, and one to a folder", async () => {
    await assertRejects(
      () => SafetensorsFile.open(`${folder}/no such`),
      Deno.errors.NotFound,
      "expected a readable safetensors file",
    );
    await assertRejects(
      () => SafetensorsFile.open(folder),
      Deno.errors.IsADirectory,
    );
  });
});

describe("SafetensorsFile.open takes", () => {
  it("S11 white space around the header", async () => {
    const path = await write(
      rawSafetensors(` \n\t{ "t" : ${entry()} }\r\n  `, FOUR),
    );
    using file = await SafetensorsFile.open(path);
    assertEquals([...file.tensors.keys()], ["t"]);
  });

  it("S29 a tensor named __proto__", async () => {
    const path = await write(rawSafetensors(`{"__proto__":${entry()}}`, FOUR));
    using file = await SafetensorsFile.open(path);
    assertEquals(file.tensor("__proto__", [1]).bytes, 4);
    assertEquals(({} as Record<string, unknown>).dtype, undefined);
  });

  it("S35 tensors of size zero, and single numbers", async () => {
    const path = await write(safetensors({
      none: { dtype: "F32", shape: [3, 0], data: new Uint8Array() },
      single: { dtype: "F32", shape: [], data: FOUR },
      last: { dtype: "BF16", shape: [0], data: new Uint8Array() },
    }));
    using file = await SafetensorsFile.open(path);
    assertEquals(file.tensor("none", [3, 0]).bytes, 0);
    assertEquals(file.tensor("single", []).bytes, 4);
  });

  it("S40 numbers that are all NaN", async () => {
    const data = new Uint8Array(Float32Array.of(NaN, NaN).buffer);
    const path = await write(safetensors({
      t: { dtype: "F32", shape: [2], data },
    }));
    using file = await SafetensorsFile.open(path);
    const into = new Float32Array(2);
    const { offset, file: from } = file.tensor("t", [2]);
    await from.read(offset, new Uint8Array(into.buffer));
    assert(into.every(Number.isNaN));
  });

  it("metadata, unknown fields and escapes, in any order", async () => {
    const path = await write(rawSafetensors(
      `{"__metadata__":{"format":"pt"},"\\u00e9\\/":${
        entry({ data_offsets: "[4,8]", more: '"x"' })
      },"a":${entry()}}`,
      new Uint8Array([1, 0, 0, 0, 2, 0, 0, 0]),
    ));
    using file = await SafetensorsFile.open(path);
    const { file: data, offset } = file.tensor("é/", [1]);
    const into = new Uint8Array(4);
    await data.read(offset, into);
    assertEquals([...into], [2, 0, 0, 0]);
  });

  it("several files with their index", async () => {
    const path = await shards({ a: "x-1.safetensors", b: "x-2.safetensors" }, {
      "x-1.safetensors": safetensors({ a: one(Uint8Array.of(1, 2, 3, 4)) }),
      "x-2.safetensors": safetensors({ b: one(Uint8Array.of(5, 6, 7, 8)) }),
    });
    using file = await SafetensorsFile.open(path);
    for (const [name, first] of [["a", 1], ["b", 5]] as const) {
      const { file: data, offset, bytes } = file.tensor(name, [1]);
      const into = new Uint8Array(bytes);
      await data.read(offset, into);
      assertEquals(into[0], first);
    }
    const missing = await assertRejects(
      () => Promise.resolve().then(() => file.tensor("c", [1])),
      FormatError,
    );
    assertStringIncludes(missing.message, "Missing from the model");
    const shape = await assertRejects(
      () => Promise.resolve().then(() => file.tensor("b", [1, 1])),
      FormatError,
    );
    assertStringIncludes(shape.message, "Shape is [1], expected shape [1, 1]");
  });
});

describe("a mutated file", () => {
  it("is refused with a FormatError or gives tensors inside the file", async () => {
    const good = safetensors({
      a: one(),
      "b.weight": { dtype: "BF16", shape: [2, 3], data: new Uint8Array(12) },
    });
    const path = `${folder}/mutant.safetensors`;
    let state = 1;
    const random = (n: number) => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return Math.floor(state / 2 ** 32 * n);
    };
    const glyphs = '{}[]",:0123456789-.eE\\u tfn';
    let refused = 0;
    for (let i = 0; i < 1500; i++) {
      const bytes = good.slice(0, good.length - (random(5) === 0 ? 1 : 0));
      for (let n = 1 + random(3); n > 0; n--) {
        bytes[random(bytes.length)] = random(3) === 0
          ? random(256)
          : glyphs.charCodeAt(random(glyphs.length));
      }
      await Deno.writeFile(path, bytes);
      try {
        using file = await SafetensorsFile.open(path);
        for (const { offset, bytes: size } of file.tensors.values()) {
          assert(offset + size <= bytes.length);
        }
      } catch (error) {
        assertInstanceOf(error, FormatError, `${error}`);
        refused++;
      }
    }
    assert(refused > 500, `${refused}`);
  });
});

describe("parseJson", () => {
  const rules = { depth: 64, members: 1000, integers: false };
  // Texts of the JSON standard's corners; JSON.parse is the independent reader.
  const good = [
    "0",
    "-0",
    "1e-05",
    "-12.50E+3",
    '""',
    '"a\\n\\u0041\\ud83d\\ude00\\/"',
    "[]",
    "[1, [2, {}], null, true, false]",
    ' {"a" : {"b": [1.5]}} ',
    '"\u007f\u0085\u2028"',
  ];
  const bad = [
    "",
    "01",
    "1.",
    ".5",
    "+1",
    "1e",
    "- 1",
    "NaN",
    "Infinity",
    "nul",
    "truee",
    "'a'",
    '"\n"',
    '"\\x"',
    '"\\u12g4"',
    '"a',
    "[1,]",
    "[,1]",
    "[1 2]",
    '{"a":1,}',
    "{a:1}",
    '{"a" 1}',
    '{"a":}',
    "[1]]",
    "\u00a01",
    "// 1",
  ];
  const plain = (value: unknown): unknown =>
    value instanceof Map
      ? Object.fromEntries([...value].map(([k, v]) => [k, plain(v)]))
      : Array.isArray(value)
      ? value.map(plain)
      : value;
  for (const text of good) {
    it(`reads ${JSON.stringify(text)} as JSON.parse does`, () => {
      assertEquals(plain(parseJson(text, rules)), JSON.parse(text));
    });
  }
  for (const text of bad) {
    it(`refuses ${JSON.stringify(text)} as JSON.parse does`, async () => {
      await assertRejects(async () => await JSON.parse(text), SyntaxError);
      await assertRejects(async () => await parseJson(text, rules), JsonError);
    });
  }
  it("refuses what JSON.parse lets through", async () => {
    for (const text of ['{"a":1,"a":1}', '"\\udc00"', "1e400"]) {
      JSON.parse(text);
      await assertRejects(async () => await parseJson(text, rules), JsonError);
    }
  });
});
