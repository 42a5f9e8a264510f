/** config.json: the named bad files C01 to C17, on a tiny model's folder with one value changed. */

import { assertEquals, assertRejects, assertStringIncludes } from "@std/assert";
import { loadModel } from "../mod.ts";
import { FormatError } from "../src/formats/error.ts";
import { SafetensorsFile } from "../src/formats/safetensors.ts";
import { afterAll, beforeAll, describe, it, testDevice } from "./device.ts";
import { safetensors, type WrittenTensor } from "./safetensors_writer.ts";

const source = new URL("golden/models/llama/", import.meta.url).pathname;
let folder = "";
const tensors: Record<string, WrittenTensor> = {};
let config: Record<string, unknown> = {};

beforeAll(async () => {
  folder = await Deno.makeTempDir({ prefix: "config_test_" });
  config = JSON.parse(await Deno.readTextFile(`${source}config.json`));
  using file = await SafetensorsFile.open(`${source}model.safetensors`);
  for (const [name, { type, shape, bytes, offset }] of file.tensors) {
    const data = new Uint8Array(bytes);
    await file.tensor(name, shape).file.read(offset, data);
    tensors[name] = { dtype: type, shape, data };
  }
});
afterAll(async () => {
  await Deno.remove(folder, { recursive: true });
});

/** Loads a folder with these values, or this text, and these tensors instead. */
async function load(
  values: Record<string, unknown> | string,
  weights: Record<string, WrittenTensor | undefined> = {},
): Promise<void> {
  const text = typeof values === "string"
    ? values
    : JSON.stringify({ ...config, ...values });
  await Deno.writeTextFile(`${folder}/config.json`, text);
  const all = Object.entries({ ...tensors, ...weights })
    .filter((entry): entry is [string, WrittenTensor] =>
      entry[1] !== undefined
    );
  await Deno.writeFile(
    `${folder}/model.safetensors`,
    safetensors(Object.fromEntries(all)),
  );
  (await loadModel(folder, { device: testDevice })).close();
}

/** `[test name, values, the field, part of the message]`. */
const BAD: readonly (readonly [
  string,
  Record<string, unknown>,
  string,
  string,
])[] = [
  [
    "C03 an unknown architecture",
    { architectures: ["GPT2LMHeadModel"] },
    "architectures",
    'Found "GPT2LMHeadModel", expected one of Gemma2ForCausalLM, Gemma3ForCausalLM, LlamaForCausalLM',
  ],
  [
    "C03 no architecture",
    { architectures: null },
    "architectures",
    "Found none",
  ],
  ...[0, -1, 1e9, "4096", 64.5].map((value) =>
    [
      `C04 hidden_size ${JSON.stringify(value)}`,
      { hidden_size: value },
      "hidden_size",
      "an integer from 8 to 65536",
    ] as const
  ),
  [
    "C05 heads that do not divide the width",
    { num_attention_heads: 3, num_key_value_heads: 1, head_dim: null },
    "num_attention_heads",
    "a divisor of hidden_size, 64",
  ],
  ...[0, 512].map((value) =>
    [
      `C06 head_dim ${value}`,
      { head_dim: value },
      "head_dim",
      "an integer from 2 to 256",
    ] as const
  ),
  ["C06 head_dim 7", { head_dim: 7 }, "head_dim", "an even number"],
  [
    "C07 KV heads that do not divide the heads",
    { num_key_value_heads: 3 },
    "num_key_value_heads",
    "a divisor of the 4 query heads",
  ],
  ...[0, 1e6].map((value) =>
    [
      `C08 ${value} layers`,
      { num_hidden_layers: value },
      "num_hidden_layers",
      "an integer from 1 to 1024",
    ] as const
  ),
  [
    "C09 rope_theta 0",
    { rope_parameters: null, rope_theta: 0 },
    "rope_theta",
    "Found 0, expected a number from 1",
  ],
  [
    "C09 rope_theta 0 inside rope_parameters",
    { rope_parameters: { rope_theta: 0 } },
    "rope_parameters.rope_theta",
    "Found 0",
  ],
  [
    "C10 an unknown rope_scaling",
    { rope_parameters: null, rope_scaling: { type: "magic", factor: 2 } },
    "rope_scaling.type",
    'Found "magic", expected one of default, linear, dynamic, yarn, llama3, longrope',
  ],
  [
    "C10 a rope_scaling without its factor",
    { rope_parameters: null, rope_scaling: { type: "linear" } },
    "rope_scaling.factor",
    "Found nothing",
  ],
  [
    "C10 factors of another number",
    {
      rope_parameters: {
        rope_type: "longrope",
        short_factor: [1],
        long_factor: [1],
        original_max_position_embeddings: 8,
      },
    },
    "short_factor",
    "Found 1 numbers, expected 8",
  ],
  ...[0, -1e-5].map((value) =>
    [
      `C11 rms_norm_eps ${value}`,
      { rms_norm_eps: value },
      "rms_norm_eps",
      "expected a number from",
    ] as const
  ),
  [
    "C12 vocab_size beside the embedding's rows",
    { vocab_size: 300 },
    'tensor "model.embed_tokens.weight"',
    "Shape is [256, 64], expected shape [300, 64]",
  ],
  [
    "C13 a tensor of another shape",
    { intermediate_size: 128 },
    'tensor "model.layers.0.mlp.gate_proj.weight"',
    "Shape is [96, 64], expected shape [128, 64]",
  ],
  [
    "C14 a tensor that is missing",
    { num_hidden_layers: 3 },
    'tensor "model.layers.2.input_layernorm.weight"',
    "Missing from the model, expected shape [64]",
  ],
  ...[-1, 0, 1.5].map((value) =>
    [
      `C16 sliding_window ${value}`,
      { architectures: ["MistralForCausalLM"], sliding_window: value },
      "sliding_window",
      "an integer from 2",
    ] as const
  ),
  [
    "C17 an unknown dtype",
    { dtype: "float12" },
    "dtype",
    'Found "float12", expected one of float32, float16, bfloat16',
  ],
  [
    "C17 an unknown torch_dtype",
    { torch_dtype: "int8" },
    "torch_dtype",
    'Found "int8"',
  ],
  [
    "another activation",
    { hidden_act: "gelu" },
    "hidden_act",
    'expected "silu"',
  ],
  [
    "quantised weights",
    { quantization_config: {} },
    "quantization_config",
    "take the weights as they were before",
  ],
  [
    "an end token outside the vocabulary",
    { eos_token_id: [2, 256] },
    "eos_token_id",
    "token ids from 0 to 255",
  ],
];

describe("a config.json is refused that has", () => {
  for (const [name, values, field, message] of BAD) {
    it(name, async () => {
      const error = await assertRejects(() => load(values), FormatError);
      assertEquals(error.field, field);
      assertStringIncludes(error.message, message);
      assertStringIncludes(error.message, folder);
    });
  }

  it("C01 no config.json beside the weights", async () => {
    await load({});
    await Deno.remove(`${folder}/config.json`);
    await assertRejects(
      () => loadModel(folder, { device: testDevice }),
      Deno.errors.IsADirectory,
      "This is a folder without a config.json",
    );
    await assertRejects(
      () => loadModel(`${folder}/model.safetensors`, { device: testDevice }),
      Deno.errors.NotFound,
      "config.json",
    );
  });

  for (const text of ["[]", "7", "{", '{"a":1,"a":1}', '{"rope_theta":NaN}']) {
    it(`C02 and C09: ${text}`, async () => {
      const error = await assertRejects(() => load(text), FormatError);
      assertStringIncludes(error.message, "config.json");
    });
  }

  it("C15 an untied head that is missing", async () => {
    const error = await assertRejects(
      () =>
        load({ tie_word_embeddings: false }, { "lm_head.weight": undefined }),
      FormatError,
    );
    assertEquals(error.field, 'tensor "lm_head.weight"');
    assertStringIncludes(error.message, "Missing from the model");
  });
});

describe("a folder is taken", () => {
  it("as it is, by its weights' path too, and with NaN in them (S40)", async () => {
    await load({});
    (await loadModel(`${folder}/model.safetensors`, { device: testDevice }))
      .close();
    const norm = tensors["model.norm.weight"]!;
    const data = norm.data.map(() => 0xff);
    await load({}, { "model.norm.weight": { ...norm, data } });
  });

  it("with the older rope_theta and rope_scaling", async () => {
    await load({
      rope_parameters: null,
      rope_theta: 5e5,
      rope_scaling: { type: "linear", factor: 2 },
    });
  });
});
