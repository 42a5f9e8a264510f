/** The GGUF reader: the named bad files G01 to G37, limits, getters, an independent reader, and mutations. */

import {
  assert,
  assertEquals,
  assertInstanceOf,
  assertLess,
  assertMatch,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { afterAll, beforeAll, describe, it } from "@std/testing/bdd";
import { gguf as readIndependently } from "npm:@huggingface/gguf@0.4.6";
import { FormatError, quote } from "../src/formats/error.ts";
import {
  GGML_TYPES,
  type GgmlType,
  ggmlType,
} from "../src/formats/ggml_types.ts";
import { GgufFile, type GgufValue } from "../src/formats/gguf.ts";
import { HeaderReader } from "../src/formats/header_reader.ts";
import {
  array,
  booleans,
  concat,
  f32,
  f32s,
  f64,
  type FieldValue,
  ggufBytes,
  type GgufInput,
  ggufMarked,
  i16,
  i32,
  i32s,
  i64,
  i8,
  strings,
  type TensorInput,
  text,
  u16,
  u32,
  u32s,
  u64,
  u8,
  VALUE_TYPE,
} from "./gguf_writer.ts";

const MIB = 1024 * 1024;

/** The folder of this run's files. */
let folder = "";
let written = 0;

beforeAll(async () => {
  folder = await Deno.makeTempDir({ prefix: "gguf_test_" });
});
afterAll(async () => {
  await Deno.remove(folder, { recursive: true });
});

/** Writes bytes to a new file and returns its path. */
async function write(bytes: Uint8Array, name?: string): Promise<string> {
  const path = `${folder}/${name ?? `${written++}.gguf`}`;
  await Deno.writeFile(path, bytes);
  return path;
}

/** Writes a file and opens it. */
async function open(input: GgufInput): Promise<GgufFile> {
  return await GgufFile.open(await write(ggufBytes(input)));
}

/** A file with one metadata pair. */
function pair(key: string | Uint8Array, value: FieldValue): Uint8Array {
  return ggufBytes({ metadata: [[key, value]] });
}

/** A file with one tensor. */
function tensor(input: Partial<TensorInput>): Uint8Array {
  return ggufBytes({ tensors: [{ name: "t", shape: [32], ...input }] });
}

/** A string whose stated length is not its own. */
function liar(length: number | bigint): FieldValue {
  return { type: VALUE_TYPE.string, bytes: u64(length).bytes };
}

/** The start of a file up to its first key. */
const HEAD = ggufBytes({ metadataCount: 1 });

/** `[test name, file, field, part of the message]` of files to refuse. */
const BAD: readonly (readonly [string, () => Uint8Array, string, string])[] = [
  ["empty file", () => new Uint8Array(0), "magic", "File is empty"],
  [
    "a file of 3 bytes",
    () => HEAD.slice(0, 3),
    "magic",
    "Data cut short: expected 4 bytes from byte 0, the file ends at byte 3",
  ],
  [
    "G01 refuses a bad magic",
    () => ggufBytes({ magic: "GGUG" }),
    "magic",
    'Found "GGUG", expected "GGUF"',
  ],
  [
    "G01 names a Git LFS pointer",
    () => new TextEncoder().encode("version https://git-lfs.github.com/spec"),
    "magic",
    "Git LFS pointer",
  ],
  [
    "G01 names a web page",
    () => new TextEncoder().encode("<!DOCTYPE html>"),
    "magic",
    "web page",
  ],
  [
    "G01 names a ZIP archive",
    () => new TextEncoder().encode("PK\x03\x04...."),
    "magic",
    "ZIP archive, such as a PyTorch checkpoint",
  ],
  [
    "G01 names a file from before GGUF",
    () => new TextEncoder().encode("lmgg...."),
    "magic",
    "GGML file from before GGUF",
  ],
  ...[0, 1, 4].map((version) =>
    [
      `G02 refuses version ${version}`,
      () => ggufBytes({ version }),
      "version",
      `Unsupported version ${version}, expected 2 or 3`,
    ] as const
  ),
  [
    "G03 refuses a byte-swapped version",
    () => ggufBytes({ version: 0x03000000 }),
    "version",
    "big-endian, expected a little-endian one",
  ],
  [
    "G03 refuses a byte-swapped magic",
    () => ggufBytes({ magic: "FUGG" }),
    "magic",
    "Byte-swapped",
  ],
  [
    "G04 refuses 2^63 tensors",
    () => ggufBytes({ tensorCount: 1n << 63n }),
    "tensor count",
    "Found 9223372036854775808, expected at most 65536",
  ],
  [
    "G04 refuses 65,537 tensors",
    () => ggufBytes({ tensorCount: 65_537 }),
    "tensor count",
    "Found 65537, expected at most 65536",
  ],
  [
    "G04 refuses more tensors than the file can hold",
    () => ggufBytes({ tensorCount: 1000 }),
    "tensor count",
    "Data cut short: found 1000, but the 8 bytes left hold at most 0",
  ],
  [
    "G05 refuses 2^63 metadata pairs",
    () => ggufBytes({ metadataCount: 1n << 63n }),
    "metadata count",
    "Found 9223372036854775808, expected at most 65536",
  ],
  [
    "G05 refuses 65,537 metadata pairs",
    () => ggufBytes({ metadataCount: 65_537 }),
    "metadata count",
    "Found 65537, expected at most 65536",
  ],
  [
    "G05 refuses more pairs than the file can hold",
    () => ggufBytes({ metadataCount: 2, metadata: [["a", u8(1)]] }),
    "metadata count",
    "Data cut short: found 2, but the 14 bytes left hold at most 1",
  ],
  ...([1n << 63n, 2n ** 64n - 1n, 100n, 5n] as const).map((length) =>
    [
      `G06 refuses a key of ${length} bytes`,
      () => concat([HEAD, u64(length).bytes, new Uint8Array(4), u32(0).bytes]),
      "metadata key 0",
      length === 5n ? "control character" : `length is ${length} bytes`,
    ] as const
  ),
  [
    "G06 refuses a key of 65,536 bytes",
    () => pair("k".repeat(65_536), u8(0)),
    "metadata key 0",
    "Length is 65536 bytes, expected at most 65535",
  ],
  [
    "G07 refuses an empty key",
    () => pair("", u32(1)),
    "metadata key 0",
    "empty",
  ],
  [
    "G07 refuses a key with a control character",
    () => pair("a\x1b[2Jb", u32(1)),
    "metadata key 0",
    '"a\\u001b[2Jb" holds a control character',
  ],
  [
    "G07 refuses a key that is not UTF-8",
    () => pair(Uint8Array.of(0x61, 0xff), u32(1)),
    "metadata key 0",
    "not valid UTF-8",
  ],
  [
    "G08 refuses a duplicate key",
    () => ggufBytes({ metadata: [["a.b", u32(1)], ["a.b", u32(2)]] }),
    "metadata key 1",
    'Name "a.b" comes twice',
  ],
  ...[13, 2 ** 32 - 1].flatMap((type) => [
    [
      `G09 refuses value type ${type}`,
      () => pair("a.b", { type, bytes: u64(0).bytes }),
      "a.b",
      `Value type is ${type}, expected 0 to 12`,
    ] as const,
    [
      `G09 refuses an array of value type ${type}`,
      () => pair("a.b", array(type, [], 0)),
      "a.b",
      `Value type is ${type}, expected 0 to 12`,
    ] as const,
  ]),
  [
    "G09 refuses a bool of 2",
    () => pair("a.b", { type: VALUE_TYPE.bool, bytes: Uint8Array.of(2) }),
    "a.b",
    "Bool is 2, expected 0 or 1",
  ],
  [
    "G09 refuses a bool of 2 in an array",
    () => pair("a.b", array(VALUE_TYPE.bool, [Uint8Array.of(0, 1, 2)], 3)),
    "a.b[2]",
    "Bool is 2, expected 0 or 1",
  ],
  ...Object.entries(VALUE_TYPE).filter(([name]) => name !== "array").map((
    [name, type],
  ) =>
    [
      `G10 refuses 2^63 elements of ${name}`,
      () => pair("a.b", array(type, [], 1n << 63n)),
      "a.b",
      `array has 9223372036854775808 elements of type ${name}, but 0 bytes`,
    ] as const
  ),
  [
    "G10 refuses an array of more elements than the file holds",
    () => pair("a.b", array(VALUE_TYPE.float64, [new Uint8Array(23)], 3)),
    "a.b",
    "array has 3 elements of type float64, but 23 bytes are left",
  ],
  [
    "G11 refuses an array of arrays, 100,000 deep",
    () => {
      const level = concat([u32(VALUE_TYPE.array).bytes, u64(1).bytes]);
      return pair("a.b", {
        type: VALUE_TYPE.array,
        bytes: concat(Array(100_000).fill(level)),
      });
    },
    "a.b",
    "Array holds arrays",
  ],
  [
    "G12 refuses a string past the end",
    () => pair("a.b", liar(1)),
    "a.b",
    "Data cut short: length is 1 bytes, but 0 are left",
  ],
  [
    "G12 refuses a string of 2^64 - 1 bytes",
    () => pair("a.b", liar(2n ** 64n - 1n)),
    "a.b",
    "length is 18446744073709551615 bytes, but 0 are left",
  ],
  [
    "G12 refuses a string past the end in an array",
    () =>
      pair("a.b", array(VALUE_TYPE.string, [text("x").bytes, u64(9).bytes])),
    "a.b[1]",
    "length is 9 bytes, but 0 are left",
  ],
  [
    "G12 refuses text that is not UTF-8",
    () => pair("a.b", text(Uint8Array.of(0xc3, 0x28))),
    "a.b",
    "not valid UTF-8",
  ],
  [
    "G12 refuses a token that is not UTF-8, naming its index",
    () =>
      pair("tokenizer.ggml.tokens", strings(["a", Uint8Array.of(0x80), "b"])),
    "tokenizer.ggml.tokens[1]",
    "not valid UTF-8",
  ],
  ...[0, 13, 2 ** 31, 2 ** 21, 2 ** 32 - 1].map((alignment, i) =>
    [
      `${
        ["G13", "G14", "G15", "G15", "G15"][i]
      } refuses alignment ${alignment}`,
      () => pair("general.alignment", u32(alignment)),
      "general.alignment",
      `Alignment is ${alignment}, expected a power of two of at most 1048576`,
    ] as const
  ),
  [
    "G16 refuses an alignment of type i32",
    () => pair("general.alignment", i32(32)),
    "general.alignment",
    "Found int32 32, expected a uint32",
  ],
  [
    "G16 refuses an alignment that is an array",
    () => pair("general.alignment", u32s([32])),
    "general.alignment",
    "Found an array of 1 values of type uint32, expected a uint32",
  ],
  [
    "G17 refuses a tensor name of 64 bytes",
    () => tensor({ name: "n".repeat(64) }),
    "tensor 0 name",
    "Length is 64 bytes, expected at most 63",
  ],
  [
    "G17 refuses an empty tensor name",
    () => tensor({ name: "" }),
    "tensor 0 name",
    "Name is empty",
  ],
  [
    "G17 refuses a NUL in a tensor name",
    () => tensor({ name: "a\0b" }),
    "tensor 0 name",
    'Name "a\\u0000b" holds a control character',
  ],
  [
    "G18 refuses a duplicate tensor",
    () =>
      ggufBytes({
        tensors: [{ name: "t", shape: [1] }, { name: "t", shape: [1] }],
      }),
    "tensor 1 name",
    'Name "t" comes twice',
  ],
  ...[0, 5, 2 ** 32 - 1].map((rank) =>
    [
      `${rank === 2 ** 32 - 1 ? "G20" : "G19"} refuses ${rank} dimensions`,
      () => tensor({ rank, shape: [1, 1, 1, 1, 1] }),
      'tensor "t" dimensions',
      `Found ${rank} dimensions, expected 1 to 4`,
    ] as const
  ),
  [
    "G21 refuses a negative dimension",
    () => tensor({ shape: [32, -1n], bytes: 0 }),
    'tensor "t" dimensions',
    "Dimension 1 is -1, expected 0 or more",
  ],
  [
    "G22 refuses dimensions whose product wraps",
    () => tensor({ shape: [1n << 32n, 1n << 32n], bytes: 0 }),
    'tensor "t" dimensions',
    "Product of dimensions 0 to 1 is 18446744073709552000, expected below 2^53",
  ],
  [
    "G22 refuses dimensions whose product wraps to zero by a zero",
    () => tensor({ shape: [0, 1n << 30n, 1n << 30n], bytes: 0 }),
    'tensor "t" dimensions',
    "Product of dimensions 0 to 2",
  ],
  [
    "G23 refuses a Q4_K of 2^62 values",
    () => tensor({ type: "Q4_K", shape: [1n << 62n], bytes: 0 }),
    'tensor "t" dimensions',
    "Dimension 0 is 4611686018427387904, expected below 2^53",
  ],
  [
    "G23 refuses bytes beyond 2^53",
    () => tensor({ type: "F64", shape: [1n << 52n], bytes: 0 }),
    'tensor "t" data',
    "Data cut short: needs 3602879701896397",
  ],
  ...[43, 9999, 2 ** 32 - 1].map((type) =>
    [
      `G24 refuses tensor type ${type}`,
      () => tensor({ type }),
      'tensor "t" type',
      `Type is ${type}, expected one that ggml knows`,
    ] as const
  ),
  ...([
    [4, "Q4_2"],
    [5, "Q4_3"],
    [31, "Q4_0_4_4"],
    [32, "Q4_0_4_8"],
    [33, "Q4_0_8_8"],
    [36, "IQ4_NL_4_4"],
    [37, "IQ4_NL_4_8"],
    [38, "IQ4_NL_8_8"],
  ] as const).map(([type, name]) =>
    [
      `G25 refuses removed type ${type}, ${name}`,
      () => tensor({ type }),
      'tensor "t" type',
      `Type is ${type} (${name}), which ggml removed`,
    ] as const
  ),
  [
    "G26 refuses Q4_K rows that are not whole blocks",
    () => tensor({ type: "Q4_K", shape: [128, 2] }),
    'tensor "t" dimensions',
    "Row length is 128, expected a multiple of 256 for type Q4_K",
  ],
  ...[32, 1, 2n ** 60n, 2n ** 64n - 1n].map((offset) =>
    [
      `G27 refuses an offset off by ${offset}`,
      () => tensor({ offset }),
      'tensor "t" offset',
      `Offset is ${offset}, expected 0`,
    ] as const
  ),
  [
    "G28 refuses sizes whose sum wraps",
    () =>
      ggufBytes({
        tensors: Array.from({ length: 9 }, (_, i) => ({
          name: `t${i}`,
          type: "F32" as const,
          shape: [1n << 51n],
          bytes: 0,
          offset: BigInt.asUintN(64, (1n << 53n) * BigInt(i)),
        })),
      }),
    'tensor "t0" data',
    "Data cut short: needs 9007199254740992 bytes at offset 0",
  ],
  [
    "G28 refuses sizes that fit one by one but not together",
    () =>
      ggufBytes({
        tensors: [{ name: "a", shape: [64] }, {
          name: "b",
          shape: [64],
          bytes: 0,
        }],
      }),
    'tensor "b" data',
    "Data cut short",
  ],
  [
    "G29 refuses data cut short",
    () => tensor({ shape: [64] }).slice(0, -1),
    'tensor "t" data',
    "Data cut short: ends at byte",
  ],
  [
    "refuses more strings than a file may hold",
    () => {
      const count = 1536 * 1024 + 1;
      return pair(
        "a.b",
        array(VALUE_TYPE.string, [new Uint8Array(8 * count)], count),
      );
    },
    "a.b",
    "Array has 1572865 strings, expected at most 1572864",
  ],
];

describe("bad GGUF files", () => {
  for (const [name, bytes, field, message] of BAD) {
    it(
      name.startsWith("G") ? name : name.replace(/^(?!refuses)/, "refuses "),
      async () => {
        const path = await write(bytes());
        const start = performance.now();
        const error = await assertRejects(
          () => GgufFile.open(path),
          FormatError,
        );
        assertLess(performance.now() - start, 2000);
        assertEquals([error.file, error.field], [path, field]);
        assert(error.message.startsWith(`${path}: ${field}: `), error.message);
        assertStringIncludes(error.message, message);
      },
    );
  }

  it("refuses a string over 64 MiB and a header over 128 MiB", async () => {
    const path = `${folder}/sparse.gguf`;
    const cases = [
      [text(""), 65 * MIB, 65 * MIB, "Length is 68157440 bytes, expected"],
      [
        array(VALUE_TYPE.uint8, [], 0),
        129 * MIB,
        129 * MIB,
        "Header is larger than 134217728 bytes",
      ],
    ] as const;
    for (const [value, length, size, message] of cases) {
      const start = pair("a.b", value);
      start.set(u64(length).bytes, start.length - 8);
      await Deno.writeFile(path, start);
      await Deno.truncate(path, start.length + size);
      await assertRejects(() => GgufFile.open(path), FormatError, message);
    }
    await Deno.remove(path);
  });

  it("refuses every cut of a good file outside its padding", async () => {
    const { bytes, end } = await sample();
    for (let length = 0; length < end; length++) {
      const path = await write(bytes.subarray(0, length), "cut.gguf");
      await assertRejects(() => GgufFile.open(path), FormatError);
    }
    const whole = await write(bytes.subarray(0, end), "cut.gguf");
    (await GgufFile.open(whole)).close();
  });

  it("stays below 512 MB and 2 s a file, for all bad files and the costliest good ones", async () => {
    const list = [];
    for (const [, bytes] of BAD) list.push(await write(bytes()));
    list.push(...await costly());
    const module = new URL("../src/formats/gguf.ts", import.meta.url).href;
    const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
      args: ["eval", "--no-lock", "--ext=ts", memoryProbe(module, list)],
      stdout: "piped",
      stderr: "piped",
    }).output();
    assertEquals(code, 0, new TextDecoder().decode(stderr));
    const { peak, slowest } = JSON.parse(new TextDecoder().decode(stdout));
    assertLess(peak, 512 * MIB);
    assertLess(slowest, 5000);
  });
});

/** A program that opens files and prints its peak memory and slowest file. */
function memoryProbe(module: string, list: readonly string[]): string {
  return `
    import { GgufFile } from ${JSON.stringify(module)};
    import { cpuUsage } from "node:process";
    // Time of the processor, as the machine may be busy with other tests.
    const spent = () => {
      const { user, system } = cpuUsage();
      return (user + system) / 1000;
    };
    let slowest = 0;
    for (const path of ${JSON.stringify(list)}) {
      const start = spent();
      try {
        (await GgufFile.open(path)).close();
      } catch (error) {
        if (error.name !== "FormatError") throw error;
      }
      slowest = Math.max(slowest, spent() - start);
    }
    let peak = Deno.memoryUsage().rss;
    try {
      const status = Deno.readTextFileSync("/proc/self/status");
      peak = 1024 * Number(/VmHWM:\\s*(\\d+)/.exec(status)[1]);
    } catch { /* Not Linux: the last figure has to do. */ }
    console.log(JSON.stringify({ peak, slowest }));
  `;
}

/** Good files that cost the most for their size. */
async function costly(): Promise<string[]> {
  const count = 1_500_000;
  const element = text("aé").bytes;
  const elements = new Uint8Array(element.length * count);
  for (let i = 0; i < count; i++) elements.set(element, i * element.length);
  const tokens = pair("a.b", array(VALUE_TYPE.string, [elements], count));

  const head = concat([
    ggufBytes({ metadataCount: 1 }),
    text("a.b").bytes,
    u32(VALUE_TYPE.array).bytes,
    u32(VALUE_TYPE.uint64).bytes,
    u64(120 * MIB / 8).bytes,
  ]);
  const numbers = await write(head, "numbers.gguf");
  await Deno.truncate(numbers, head.length + 120 * MIB);
  return [await write(tokens, "tokens.gguf"), numbers];
}

/** A good file with every value type, and where its last tensor ends. */
function sample(): {
  input: GgufInput;
  bytes: Uint8Array<ArrayBuffer>;
  end: number;
  marks: ReturnType<typeof ggufMarked>["marks"];
} {
  const input: GgufInput = {
    alignment: 64,
    metadata: [
      ["general.architecture", "llama"],
      ["general.alignment", u32(64)],
      ["a.u8", u8(200)],
      ["a.i8", i8(-100)],
      ["a.u16", u16(60_000)],
      ["a.i16", i16(-30_000)],
      ["a.u32", u32(4_000_000_000)],
      ["a.i32", i32(-2_000_000_000)],
      ["a.u64", u64(2n ** 53n - 1n)],
      ["a.i64", i64(-(2n ** 53n - 1n))],
      ["a.f32", f32(0.5)],
      ["a.f64", f64(Math.PI)],
      ["a.yes", true],
      ["a.no", false],
      ["a.empty", ""],
      ["a.text", "h\u00e9llo \ufeff\u{1f600}\0"],
      ["a.strings", ["", "a", "\ufeff", "\u0120the", "x".repeat(40)]],
      ["a.i32s", i32s([1, -2, 3])],
      ["a.u32s", u32s([1, 2 ** 32 - 1])],
      ["a.f32s", f32s([0.25, -1e30])],
      ["a.none", i32s([])],
    ],
    tensors: [
      { name: "token_embd.weight", type: "Q8_0", shape: [64, 3] },
      { name: "norm", shape: [7], data: Float32Array.of(1, 2, 3, 4, 5, 6, 7) },
      { name: "q", type: "Q4_K", shape: [256, 2] },
      { name: "four", type: "F16", shape: [2, 3, 1, 5] },
      { name: "last", type: "BF16", shape: [3] },
    ],
  };
  const { bytes, marks } = ggufMarked(input);
  return { input, bytes, marks, end: bytes.length - 64 + 6 };
}

describe("good GGUF files", () => {
  it("are read as they were written", async () => {
    const { bytes } = sample();
    const path = await write(bytes);
    using file = await GgufFile.open(path);
    assertEquals([file.path, file.version, file.size], [path, 3, bytes.length]);
    const expected: Record<string, GgufValue> = {
      "general.architecture": "llama",
      "general.alignment": 64,
      "a.u8": 200,
      "a.i8": -100,
      "a.u16": 60_000,
      "a.i16": -30_000,
      "a.u32": 4_000_000_000,
      "a.i32": -2_000_000_000,
      "a.u64": Number.MAX_SAFE_INTEGER,
      "a.i64": Number.MIN_SAFE_INTEGER,
      "a.f32": 0.5,
      "a.f64": Math.PI,
      "a.yes": true,
      "a.no": false,
      "a.empty": "",
      "a.text": "h\u00e9llo \ufeff\u{1f600}\0",
      "a.strings": ["", "a", "\ufeff", "\u0120the", "x".repeat(40)],
      "a.i32s": Int32Array.of(1, -2, 3),
      "a.u32s": Uint32Array.of(1, 2 ** 32 - 1),
      "a.f32s": Float32Array.of(0.25, -1e30),
      "a.none": new Int32Array(0),
    };
    assertEquals(Object.fromEntries(file.metadata), expected);
    assertEquals([...file.tensors.keys()], [
      "token_embd.weight",
      "norm",
      "q",
      "four",
      "last",
    ]);
    const norm = file.tensor("norm", [7]);
    assertEquals([norm.type, norm.bytes, norm.offset % 64], ["F32", 28, 0]);
    const data = new Uint8Array(norm.bytes);
    await norm.file.read(norm.offset, data);
    assertEquals(
      new Float32Array(data.buffer),
      Float32Array.of(1, 2, 3, 4, 5, 6, 7),
    );
  });

  it("may be of version 2, hold nothing, or end in other bytes", async () => {
    (await open({ version: 2 })).close();
    const path = await write(concat([tensor({}), new Uint8Array(99)]));
    (await GgufFile.open(path)).close();
  });

  it("may hold integers above 2^53, which stay exact", async () => {
    using file = await open({
      metadata: [
        ["u", u64(2n ** 64n - 1n)],
        ["i", i64(-(2n ** 63n))],
        ["us", array(VALUE_TYPE.uint64, [u64(2n ** 64n - 1n).bytes])],
        ["is", array(VALUE_TYPE.int64, [i64(-5).bytes, i64(7).bytes])],
        ["bools", booleans([true, false])],
      ],
    });
    assertEquals(file.metadata.get("u"), 2n ** 64n - 1n);
    assertEquals(file.metadata.get("i"), -(2n ** 63n));
    assertEquals(file.metadata.get("us"), BigUint64Array.of(2n ** 64n - 1n));
    assertEquals(file.metadata.get("is"), Float64Array.of(-5, 7));
    assertEquals(file.metadata.get("bools"), Uint8Array.of(1, 0));
    assertThrows(() => file.numbers("us"), FormatError, "below 2^53");
    assertThrows(
      () => file.integer("u", { min: 0, max: 10 }),
      FormatError,
      "Found uint64 18446744073709551615, expected an integer from 0 to 10",
    );
  });

  it("may hold a tensor without values", async () => {
    using file = await open({
      tensors: [{ name: "none", shape: [4, 0] }, { name: "t", shape: [1] }],
    });
    assertEquals(file.tensor("none").bytes, 0);
    assertEquals(file.tensor("none").offset, file.tensor("t").offset);
  });

  it("are measured right for every type", async () => {
    // Bytes of the C structs, field by field, with 256-value superblocks.
    const structs: Record<GgmlType, [values: number, ...bytes: number[]]> = {
      F32: [1, 4],
      F16: [1, 2],
      BF16: [1, 2],
      F64: [1, 8],
      I8: [1, 1],
      I16: [1, 2],
      I32: [1, 4],
      I64: [1, 8],
      Q1_0: [128, 2, 16],
      Q2_0: [64, 2, 16],
      Q4_0: [32, 2, 16],
      Q4_1: [32, 2, 2, 16],
      Q5_0: [32, 2, 4, 16],
      Q5_1: [32, 2, 2, 4, 16],
      Q8_0: [32, 2, 32],
      Q8_1: [32, 2, 2, 32],
      Q2_K: [256, 16, 64, 2, 2],
      Q3_K: [256, 32, 64, 12, 2],
      Q4_K: [256, 2, 2, 12, 128],
      Q5_K: [256, 2, 2, 12, 32, 128],
      Q6_K: [256, 128, 64, 16, 2],
      Q8_K: [256, 4, 256, 32],
      IQ1_S: [256, 2, 32, 16],
      IQ1_M: [256, 32, 16, 8],
      IQ2_XXS: [256, 2, 64],
      IQ2_XS: [256, 2, 64, 8],
      IQ2_S: [256, 2, 64, 8, 8],
      IQ3_XXS: [256, 2, 96],
      IQ3_S: [256, 2, 64, 8, 32, 4],
      IQ4_NL: [32, 2, 16],
      IQ4_XS: [256, 2, 2, 4, 128],
      TQ1_0: [256, 48, 4, 2],
      TQ2_0: [256, 64, 2],
      MXFP4: [32, 1, 16],
      NVFP4: [64, 4, 32],
    };
    const names = Object.keys(GGML_TYPES) as GgmlType[];
    assertEquals(names.toSorted(), Object.keys(structs).toSorted());
    using file = await open({
      tensors: names.map((type) => ({ name: type, type, shape: [512, 3] })),
    });
    for (const type of names) {
      const [values, ...bytes] = structs[type];
      const block = bytes.reduce((sum, part) => sum + part, 0);
      assertEquals(ggmlType(GGML_TYPES[type].id), type);
      assertEquals(file.tensor(type).type, type);
      assertEquals(file.tensor(type).bytes, 512 * 3 / values * block, type);
    }
  });

  it("G37 ignores the key __proto__ safely", async () => {
    using file = await open({
      metadata: [["__proto__", "x"], ["constructor", u32(1)]],
      tensors: [{ name: "__proto__", shape: [1] }],
    });
    assertEquals(file.string("__proto__"), "x");
    assertEquals(file.tensor("__proto__").shape, [1]);
    assertEquals(({} as Record<string, unknown>).x, undefined);
    assertThrows(() => file.tensor("toString"), FormatError, "Missing");
    assertThrows(() => file.string("toString"), FormatError, "Missing");
  });
});

describe("getters", () => {
  const metadata: GgufInput["metadata"] = [
    ["llama.block_count", u32(2 ** 32 - 1)],
    ["llama.attention.head_count", u32(0)],
    ["llama.attention.head_count_kv", u32(10)],
    ["nan", f32(NaN)],
    ["inf", f64(Infinity)],
    ["half", f32(0.5)],
    ["whole", f32(4)],
    ["five", u64(5)],
    ["minus", i32(-1)],
    ["yes", true],
    ["word", "w\x1bord"],
    ["words", ["a", "b"]],
    ["list", i32s([1, 2])],
    ["bools", booleans([true])],
  ];
  let file: GgufFile;
  beforeAll(async () => {
    file = await open({
      metadata,
      tensors: [{ name: "t", shape: [64, 3] }, { name: "v", shape: [64] }],
    });
  });
  afterAll(() => file?.close());

  /** Asserts a FormatError of a key. */
  function refuses(get: () => unknown, field: string, message: string): void {
    const error = assertThrows(get, FormatError, message);
    assertEquals([error.file, error.field], [file.path, field]);
    assertStringIncludes(error.message, `${file.path}: ${field}: `);
  }

  it("G30 refuse a block_count of 2^32 - 1", () => {
    refuses(
      () => file.integer("llama.block_count", { min: 1, max: 1024 }),
      "llama.block_count",
      "Found uint32 4294967295, expected an integer from 1 to 1024",
    );
  });

  it("G31 refuse a head_count of 0", () => {
    refuses(
      () => file.integer("llama.attention.head_count", { min: 1, max: 1024 }),
      "llama.attention.head_count",
      "Found uint32 0, expected an integer from 1 to 1024",
    );
  });

  it("G32 refuse a head_count_kv above head_count", () => {
    refuses(
      () => file.integer("llama.attention.head_count_kv", { min: 1, max: 9 }),
      "llama.attention.head_count_kv",
      "Found uint32 10, expected an integer from 1 to 9",
    );
  });

  it("return values of their type and within range", () => {
    assertEquals(file.integer("five", { min: 5, max: 5 }), 5);
    assertEquals(file.integer("minus", { min: -1, max: 0 }), -1);
    assertEquals(file.float("half", { min: 0, max: 1 }), 0.5);
    assertEquals(file.boolean("yes"), true);
    assertEquals(file.string("word"), "w\x1bord");
    assertEquals(file.strings("words"), ["a", "b"]);
    assertEquals([...Array.from(file.numbers("list"))], [1, 2]);
    assertEquals([...Array.from(file.numbers("bools"))], [1]);
  });

  it("return the fallback only when the key is absent", () => {
    const range = { min: 0, max: 10, fallback: 77 };
    assertEquals(file.integer("none", range), 77);
    assertEquals(file.float("none", range), 77);
    assertEquals(file.boolean("none", false), false);
    assertEquals(file.string("none", ""), "");
    refuses(() => file.integer("half", range), "half", "expected an integer");
    refuses(() => file.string("five", ""), "five", "expected a string");
    refuses(() => file.boolean("five", true), "five", "expected a bool");
  });

  it("refuse absent keys and other types", () => {
    const range = { min: 0, max: 10 };
    refuses(() => file.integer("none", range), "none", "Missing, expected an");
    refuses(() => file.float("none", range), "none", "Missing, expected a fl");
    refuses(() => file.boolean("none"), "none", "Missing, expected a bool");
    refuses(() => file.string("none"), "none", "Missing, expected a string");
    refuses(() => file.strings("none"), "none", "Missing, expected an array");
    refuses(() => file.numbers("none"), "none", "Missing, expected an array");
    for (const key of ["whole", "yes", "word", "words", "list"]) {
      refuses(() => file.integer(key, range), key, "expected an integer");
    }
    for (const key of ["five", "nan", "inf", "yes", "list"]) {
      refuses(() => file.float(key, range), key, "expected a float");
    }
    refuses(() => file.boolean("five"), "five", "Found uint64 5");
    refuses(() => file.string("words"), "words", "Found an array of 2 values");
    refuses(() => file.strings("list"), "list", "of type int32, expected an");
    refuses(() => file.strings("word"), "word", 'Found the string "w\\u001bor');
    refuses(() => file.numbers("words"), "words", "of type string, expected");
  });

  it("refuse absent tensors and other shapes", () => {
    assertEquals(file.tensor("t", [64, 3]).shape, [64, 3]);
    assertEquals(file.tensor("v", [64, 1]).shape, [64]);
    refuses(
      () => file.tensor("t", [3, 64]),
      'tensor "t"',
      "Shape is [64, 3], expected shape [3, 64]",
    );
    refuses(() => file.tensor("t", [64]), 'tensor "t"', "Shape is [64, 3]");
    refuses(
      () => file.tensor("x", [4]),
      'tensor "x"',
      "Missing from the file, expected shape [4]",
    );
  });
});

describe("G36 a model in several files", () => {
  /** What a part says of itself, and what it holds. */
  interface Part {
    no?: FieldValue | number | undefined;
    count?: FieldValue | number | undefined;
    tensors?: FieldValue | number | undefined;
    holds?: string[];
    metadata?: [string, FieldValue][];
    alignment?: number;
  }

  const number = (value: FieldValue | number, as: (n: number) => FieldValue) =>
    typeof value === "number" ? as(value) : value;

  function part(
    { no, count, tensors, holds = [], metadata = [], alignment = 32 }: Part,
  ) {
    const fields: [string, FieldValue][] = [...metadata];
    if (alignment !== 32) fields.push(["general.alignment", u32(alignment)]);
    if (no !== undefined) fields.push(["split.no", number(no, u16)]);
    if (count !== undefined) fields.push(["split.count", number(count, u16)]);
    if (tensors !== undefined) {
      fields.push(["split.tensors.count", number(tensors, i32)]);
    }
    return ggufBytes({
      metadata: fields,
      alignment,
      tensors: holds.map((name) => ({
        name,
        shape: [4],
        data: Float32Array.from(name.padEnd(4), (c) => c.charCodeAt(0)),
      })),
    });
  }

  let models = 0;
  const nameOf = (stem: string, part: number, of: number) =>
    `${stem}-0000${part}-of-0000${of}.gguf`;

  /** Writes a model in three parts, these changed; gives the paths. */
  async function model(
    changes: Record<number, Part | null> = {},
  ): Promise<string[]> {
    const stem = `split${models++}`;
    const own: Part[] = [
      {
        holds: ["a", "b"],
        metadata: [["general.architecture", "llama"], ["n", u32(7)]],
      },
      { holds: ["c"] },
      { holds: ["d", "e"], metadata: [["n", u32(7)]] },
    ];
    const paths: string[] = [];
    for (const [no, content] of own.entries()) {
      const name = nameOf(stem, no + 1, 3);
      paths.push(`${folder}/${name}`);
      const change = changes[no];
      if (change === null) continue;
      await write(
        part({ no, count: 3, tensors: 5, ...content, ...change }),
        name,
      );
    }
    return paths;
  }

  async function refused(
    path: string,
    file: string,
    field: string,
    says: string,
  ): Promise<void> {
    const error = await assertRejects(() => GgufFile.open(path), FormatError);
    assertStringIncludes(error.message, says);
    assertEquals([error.file, error.field], [file, field]);
  }

  it("G36 is read as one", async () => {
    const paths = await model();
    using file = await GgufFile.open(paths[0]!);
    assertEquals(file.path, paths[0]);
    assertEquals(file.parts, 3);
    const sizes = paths.map((path) => Deno.statSync(path).size);
    assertEquals(file.size, sizes.reduce((a, b) => a + b));
    assertEquals(file.string("general.architecture"), "llama");
    assertEquals([...file.tensors.keys()], ["a", "b", "c", "d", "e"]);
    const held = { a: 0, b: 0, c: 1, d: 2, e: 2 };
    for (const [name, no] of Object.entries(held)) {
      const tensor = file.tensor(name, [4]);
      assertEquals(tensor.file.path, paths[no]);
      const data = new Float32Array(4);
      await tensor.file.read(tensor.offset, new Uint8Array(data.buffer));
      assertEquals(data[0], name.charCodeAt(0));
    }
    file.close();
    const closed = file.tensor("e").file;
    await assertRejects(
      () => closed.read(0, new Uint8Array(1)),
      Deno.errors.BadResource,
    );
  });

  it("G36 may have no tensor in its first file, and its own alignments", async () => {
    const [path] = await model({
      0: { holds: [], alignment: 64 },
      2: { holds: ["a", "b", "d", "e"], alignment: 128 },
    });
    using file = await GgufFile.open(path!);
    assertEquals([...file.tensors.keys()].join(""), "cabde");
    const { offset, bytes, file: data } = file.tensor("e");
    assertEquals(offset % 128, 0);
    const into = new Uint8Array(bytes);
    await data.read(offset, into);
    assertEquals(new Float32Array(into.buffer)[0], "e".charCodeAt(0));
  });

  it("G36 names the missing part", async () => {
    for (const no of [1, 2]) {
      const paths = await model({ [no]: null });
      await refused(
        paths[0]!,
        paths[0]!,
        "split.count",
        `split into 3 files, expected ${
          JSON.stringify(paths[no])
        }, which is missing`,
      );
    }
  });

  it("G36 begins with its first part", async () => {
    const paths = await model();
    for (const no of [1, 2]) {
      await refused(
        paths[no]!,
        paths[no]!,
        "split.no",
        `part ${no + 1} of 3 of a model, expected the first, ${
          JSON.stringify(paths[0])
        }`,
      );
    }
  });

  it("G36 refuses parts that are in another's place", async () => {
    let paths = await model({ 1: { no: 2 }, 2: { no: 1 } });
    await refused(
      paths[0]!,
      paths[1]!,
      "split.no",
      'This is part 3 of 3 of a model, expected its name to end in "-00003-of-00003.gguf"',
    );
    paths = await model({ 0: { no: 1 } });
    await refused(paths[0]!, paths[0]!, "split.no", "This is part 2 of 3");
    // Under no part's name.
    const path = await write(part({ no: 0, count: 3, tensors: 5 }));
    await refused(
      path,
      path,
      "split.no",
      'expected its name to end in "-00001-of-00003.gguf"',
    );
  });

  it("G36 refuses counts that do not match", async () => {
    let paths = await model({ 2: { count: 4 } });
    await refused(paths[0]!, paths[2]!, "split.no", "part 3 of 4");
    paths = await model({ 1: { count: undefined } });
    await refused(paths[0]!, paths[1]!, "split.count", "a model in one file");
    paths = await model({ 1: { tensors: 6 } });
    await refused(
      paths[0]!,
      paths[1]!,
      "split.tensors.count",
      "Found 6, expected 5 as in the first part",
    );
    for (const holds of [[], ["c", "x"]]) {
      paths = await model({ 1: { holds } });
      await refused(
        paths[0]!,
        paths[0]!,
        "split.tensors.count",
        `The 3 files hold ${4 + holds.length} tensors, expected 5`,
      );
    }
  });

  it("G36 refuses a tensor that two parts hold", async () => {
    const paths = await model({ 2: { holds: ["d", "b"] } });
    await refused(
      paths[0]!,
      paths[2]!,
      'tensor "b"',
      `Lies in ${JSON.stringify(paths[0])} as well, expected it once`,
    );
  });

  it("G36 refuses parts of another model, by whatever both say", async () => {
    const paths = await model({ 2: { metadata: [["n", u32(8)]] } });
    await refused(
      paths[0]!,
      paths[2]!,
      "n",
      "Found uint32 8, which differs from the first part's",
    );
    const lists = await model({
      0: { metadata: [["n", u32s([1, 2])]] },
      2: { metadata: [["n", u32s([1, 3])]] },
    });
    await refused(lists[0]!, lists[2]!, "n", "expected parts of one model");
    const same = await model({
      0: { metadata: [["n", strings(["x"])]] },
      2: { metadata: [["n", strings(["x"])]] },
    });
    (await GgufFile.open(same[0]!)).close();
  });

  it("G36 refuses numbers that are none", async () => {
    const wrong: [Part, string][] = [
      ...[i16(-1), f32(2.5), text("2"), u64(2n ** 63n), u16(1000)].map((
        count,
      ): [Part, string] => [{ count }, "split.count"]),
      ...[undefined, i16(-1), u16(3), f32(0)].map((no): [Part, string] => [
        { no },
        "split.no",
      ]),
      ...[undefined, i32(-1), u32(65_537), f32(5)].map((
        tensors,
      ): [Part, string] => [{ tensors }, "split.tensors.count"]),
    ];
    for (const [change, field] of wrong) {
      const [path] = await model({ 0: change });
      await refused(path!, path!, field, "expected a whole number from 0 to");
    }
  });

  it("G36 names the part that is malformed", async () => {
    const paths = await model();
    await Deno.truncate(paths[1]!, 40);
    const error = await assertRejects(
      () => GgufFile.open(paths[0]!),
      FormatError,
      "Data cut short",
    );
    assertEquals(error.file, paths[1]);
    await Deno.remove(paths[1]!);
    await Deno.mkdir(paths[1]!);
    await assertRejects(
      () => GgufFile.open(paths[0]!),
      Deno.errors.IsADirectory,
      "-00002-of-00003.gguf",
    );
  });

  it("G36 says that it is one file, or has a part's name only", async () => {
    (await GgufFile.open(await write(part({ no: 0, count: 1 })))).close();
    const name = nameOf("alone", 1, 2);
    (await GgufFile.open(await write(part({ holds: ["a"] }), name))).close();
  });
});

describe("paths", () => {
  it("that name nothing are NotFound, naming the path", async () => {
    const error = await assertRejects(
      () => GgufFile.open(`${folder}/no such.gguf`),
      Deno.errors.NotFound,
    );
    assertMatch(
      error.message,
      /^Cannot open ".*no such.gguf": No such file or directory, expected a readable GGUF file$/,
    );
  });

  it("that are too long name nothing either", async () => {
    await assertRejects(
      () => GgufFile.open("x".repeat(300)),
      Deno.errors.NotFound,
      "File name too long, expected a readable GGUF file",
    );
  });

  it("of a folder are IsADirectory, naming the path", async () => {
    const error = await assertRejects(
      () => GgufFile.open(folder),
      Deno.errors.IsADirectory,
    );
    assertStringIncludes(error.message, folder);
  });

  it("below a file are NotADirectory, naming the path", async () => {
    const path = await write(ggufBytes({}));
    const error = await assertRejects(
      () => GgufFile.open(`${path}/x`),
      Deno.errors.NotADirectory,
    );
    assertStringIncludes(error.message, path);
  });

  it("that may not be read are PermissionDenied, naming the path", async () => {
    const path = await write(ggufBytes({}));
    // Root may read any file, so the refusal is played.
    const original = Deno.open;
    Deno.open = () =>
      Promise.reject(
        new Deno.errors.PermissionDenied(
          `Permission denied (os error 13): open '${path}'`,
        ),
      );
    try {
      const error = await assertRejects(
        () => GgufFile.open(path),
        Deno.errors.PermissionDenied,
      );
      assertEquals(
        error.message,
        `Cannot open ${
          quote(path)
        }: Permission denied, expected a readable GGUF file`,
      );
    } finally {
      Deno.open = original;
    }
  });

  it("that Deno's permissions deny pass as they are", async () => {
    const denied = new Deno.errors.NotCapable('Requires read access to "m"');
    const original = Deno.stat;
    Deno.stat = () => Promise.reject(denied);
    try {
      const error = await assertRejects(() => GgufFile.open("m"));
      assert(error === denied);
    } finally {
      Deno.stat = original;
    }
  });

  it("of a device are refused without reading it", async () => {
    await assertRejects(
      () => GgufFile.open("/dev/zero"),
      FormatError,
      "expected a regular file",
    );
  });

  it("of another type are TypeErrors", async () => {
    await assertRejects(
      () => GgufFile.open(7 as unknown as string),
      TypeError,
      "path is number, expected a string",
    );
  });
});

describe("reading data", () => {
  it("refuses a file that shrank after it was opened", async () => {
    const path = await write(tensor({ shape: [256, 1024] }));
    using file = await GgufFile.open(path);
    await Deno.truncate(path, 100_000);
    const { offset, bytes, file: data } = file.tensor("t");
    const error = await assertRejects(
      () => data.read(offset, new Uint8Array(bytes)),
      FormatError,
      "Data cut short: the file ends at byte 100000",
    );
    assertStringIncludes(error.field, `bytes ${offset} to `);
  });

  it("refuses a header that shrinks while it is read", async () => {
    const source = { read: () => Promise.resolve(null) };
    const options = { path: "m.gguf", size: 100, limit: 100 };
    await assertRejects(
      () => new HeaderReader(source, options).fill(4),
      FormatError,
      "m.gguf: header: Data cut short: the file had 100 bytes when opened",
    );
  });

  it("copes with a source that gives a byte at a time", async () => {
    const bytes = concat([
      u16(700).bytes,
      text("long enough to be no short text").bytes,
      i32s([1, 2, 3]).bytes,
    ]);
    let at = 0;
    const source = {
      read(into: Uint8Array): Promise<number | null> {
        if (at === bytes.length) return Promise.resolve(null);
        into[0] = bytes[at++]!;
        return Promise.resolve(1);
      },
    };
    const reader = new HeaderReader(source, {
      path: "m",
      size: bytes.length,
      limit: bytes.length,
    });
    await reader.fill(10);
    assertEquals([reader.u16(), reader.u64()], [700, 31]);
    await reader.fill(31);
    assertEquals(reader.text(31), "long enough to be no short text");
    const rest = new Uint8Array(24);
    await reader.copy(rest);
    assertEquals(rest, i32s([1, 2, 3]).bytes);
    assertEquals(reader.left, 0);
    assertThrows(() => reader.u8(), RangeError, "0 are buffered");
  });

  it("keeps reads apart that overlap in time", async () => {
    const data = Uint8Array.from({ length: 100_000 }, (_, i) => i % 251);
    const path = await write(tensor({ type: "I8", shape: [100_000], data }));
    using file = await GgufFile.open(path);
    const { offset, file: from } = file.tensor("t");
    await Promise.all(Array.from({ length: 50 }, async (_, i) => {
      const into = new Uint8Array(1000);
      await from.read(offset + i * 1999, into);
      assertEquals(into, data.subarray(i * 1999, i * 1999 + 1000));
    }));
  });

  it("reads strings and arrays across chunks", async () => {
    const words = Array.from({ length: 200_000 }, (_, i) => `w\u00f6rd ${i}`);
    const long = "\u20ac".repeat(1_000_000);
    const numbers = Array.from({ length: 600_000 }, (_, i) => i);
    using file = await open({
      metadata: [["words", words], ["long", long], ["numbers", u32s(numbers)], [
        "end",
        u8(9),
      ]],
    });
    assertEquals(file.strings("words").join(), words.join());
    assert(file.string("long") === long);
    assertEquals(file.numbers("numbers"), Uint32Array.from(numbers));
    assertEquals(file.metadata.get("end"), 9);
  });

  it("refuses offsets that are none, and a closed file", async () => {
    const file = await open({ tensors: [{ name: "t", shape: [1] }] });
    const { file: data } = file.tensor("t");
    for (const offset of [-1, 0.5, NaN, 2 ** 53]) {
      await assertRejects(
        () => data.read(offset, new Uint8Array(1)),
        RangeError,
        `offset is ${offset}`,
      );
    }
    file.close();
    file.close();
    await assertRejects(
      () => data.read(0, new Uint8Array(1)),
      Deno.errors.BadResource,
      "the file is closed",
    );
  });

  it("leaves no file open when opening fails or the owner is dropped", async () => {
    if (Deno.build.os !== "linux") return;
    const good = await write(ggufBytes({}));
    const bad = await write(ggufBytes({ version: 9 }));
    const module = new URL("../src/formats/gguf.ts", import.meta.url).href;
    const program = `
      import { GgufFile } from ${JSON.stringify(module)};
      const count = () => [...Deno.readDirSync("/proc/self/fd")].length;
      const before = count();
      for (let i = 0; i < 20; i++) {
        await GgufFile.open(${JSON.stringify(bad)}).catch(() => {});
      }
      const failed = count() - before;
      await (async () => {
        for (let i = 0; i < 20; i++) await GgufFile.open(${
      JSON.stringify(good)
    });
      })();
      for (let i = 0; i < 10; i++) {
        gc();
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
      console.log(JSON.stringify([failed, count() - before]));
    `;
    const { stdout, stderr } = await new Deno.Command(Deno.execPath(), {
      args: [
        "eval",
        "--no-lock",
        "--ext=ts",
        "--v8-flags=--expose-gc",
        program,
      ],
      stdout: "piped",
      stderr: "piped",
    }).output();
    const printed = new TextDecoder().decode(stdout);
    assert(printed !== "", new TextDecoder().decode(stderr));
    const [failed, dropped] = JSON.parse(printed);
    assertEquals(failed, 0);
    // The collector may still see the last one on its stack.
    assertLess(dropped, 3);
  });
});

describe("an independent reader", () => {
  /** Values with bigints and typed arrays made plain, for comparison. */
  function plain(value: unknown): unknown {
    if (typeof value === "bigint") return Number(value);
    // The other reader drops a byte order mark; ours must keep it.
    if (typeof value === "string") return value.replace(/^\ufeff/, "");
    if (ArrayBuffer.isView(value) || Array.isArray(value)) {
      return Array.from(value as unknown as ArrayLike<unknown>, plain);
    }
    return value;
  }

  /** Compares all metadata and the tensor table of a file. */
  async function compare(path: string): Promise<void> {
    using file = await GgufFile.open(path);
    const other = await readIndependently(path, { allowLocalFile: true });
    const { version, tensor_count, kv_count, ...metadata } = other
      .metadata as unknown as Record<string, unknown>;
    assertEquals(
      [version, tensor_count, kv_count].map(Number),
      [file.version, file.tensors.size, file.metadata.size],
    );
    assertEquals(Object.keys(metadata), [...file.metadata.keys()]);
    for (const [key, value] of file.metadata) {
      assertEquals(plain(value), plain(metadata[key]), key);
    }
    assertEquals(
      [...file.tensors.values()].map(({ name, type, shape, offset }) => ({
        name,
        type: GGML_TYPES[type].id,
        shape: [...shape],
        offset,
      })),
      other.tensorInfos.map(({ name, dtype, shape, offset }) => ({
        name,
        type: Number(dtype),
        shape: shape.map(Number),
        offset: Number(offset + other.tensorDataOffset),
      })),
    );
  }

  it("agrees on a file of the tests' writer", async () => {
    await compare(await write(sample().bytes));
  });

  it("agrees on the default model", async (t) => {
    const cache = Deno.env.get("XDG_CACHE_HOME") ??
      `${Deno.env.get("HOME")}/.cache`;
    const path = `${cache}/weightedkv/models/SmolLM2-135M-Instruct.Q4_1.gguf`;
    const present = await Deno.stat(path).then(() => true, () => false);
    if (!present) {
      t.skip("the default model is not in the cache");
      return;
    }
    const start = performance.now();
    using file = await GgufFile.open(path);
    assertLess(performance.now() - start, 2000);
    assertEquals([file.tensors.size, file.metadata.size], [272, 33]);
    assertEquals(file.tensor("token_embd.weight", [576, 49_152]).type, "Q8_0");
    await compare(path);
  });
});

/** A small seeded generator of uniform 32-bit integers (mulberry32). */
function generator(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return (x ^ (x >>> 14)) >>> 0;
  };
}

describe("mutated GGUF files", () => {
  const { bytes, marks } = sample();
  const edges = [
    0n,
    1n,
    2n,
    5n,
    9n,
    31n,
    32n,
    63n,
    64n,
    65_536n,
    (1n << 31n) - 1n,
    1n << 31n,
    (1n << 32n) - 1n,
    1n << 32n,
    (1n << 53n) - 1n,
    1n << 53n,
    1n << 62n,
    (1n << 63n) - 1n,
    1n << 63n,
    (1n << 64n) - 1n,
  ];

  /** One to three changes: a number, a byte, a cut, a repeat, a removal. */
  function mutate(next: () => number): Uint8Array {
    let out = bytes.slice();
    for (let changes = 1 + next() % 3; changes > 0; changes--) {
      const at = next() % out.length;
      const length = Math.min(1 + next() % 40, out.length - at);
      const kind = next() % 10;
      if (kind < 5) {
        const mark = marks[next() % marks.length]!;
        if (mark.at + mark.size > out.length) continue;
        const view = new DataView(out.buffer, mark.at, mark.size);
        const old = mark.size === 4
          ? BigInt(view.getUint32(0, true))
          : view.getBigUint64(0, true);
        const value = next() % 2
          ? edges[next() % edges.length]!
          : old + BigInt(next() % 9) - 4n;
        if (mark.size === 4) {
          view.setUint32(0, Number(BigInt.asUintN(32, value)), true);
        } else {
          view.setBigUint64(0, BigInt.asUintN(64, value), true);
        }
      } else if (kind < 7) {
        out[at] = next();
      } else if (kind === 7) {
        out = out.slice(0, at + 1);
      } else if (kind === 8) {
        const part = out.slice(at, at + length);
        out = concat([out.subarray(0, at), part, out.subarray(at)]);
      } else {
        out = concat([out.subarray(0, at), out.subarray(at + length)]);
        if (out.length === 0) return out;
      }
    }
    return out;
  }

  it("are refused with a FormatError or read, and nothing else", async () => {
    const next = generator(1);
    const path = `${folder}/mutant.gguf`;
    let refused = 0;
    let read = 0;
    const until = performance.now() + 10_000;
    for (let i = 0; i < 4000 && performance.now() < until; i++) {
      const mutant = mutate(next);
      Deno.writeFileSync(path, mutant);
      const start = performance.now();
      try {
        using file = await GgufFile.open(path);
        for (const tensor of file.tensors.values()) {
          assert(tensor.offset + tensor.bytes <= mutant.length);
        }
        read++;
      } catch (error) {
        assertInstanceOf(error, FormatError, `mutation ${i}: ${error}`);
        assertEquals(error.file, path);
        refused++;
      }
      assertLess(performance.now() - start, 2000);
    }
    assert(refused > 100 && read > 100, `${refused} refused, ${read} read`);
  });
});

describe("quote()", () => {
  it("leaves nothing that a terminal would act on", () => {
    assertEquals(
      quote("\x1b\x7f\x9b\u202e\u2028a\u00e9"),
      '"\\u001b\\u007f\\u009b\\u202e\\u2028a\u00e9"',
    );
    assertEquals(quote("x".repeat(100)).length, 82);
  });
});
