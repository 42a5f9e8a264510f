/** That weights reach the device without a second copy of the model in memory. */

import { assert, assertEquals, assertGreater, assertLess } from "@std/assert";
import { describe, it, testDevice, testLibrary } from "./device.ts";
import { execute, ROOT } from "./cli_process.ts";
import { type LargeFormat, writeLargeModel } from "./large_model.ts";

/** Of 32 MiB each. */
const LAYERS = 9;
/** What pieces on their way, a tokenizer and garbage may take. */
const ROOM = 64 << 20;

const formats: LargeFormat[] = ["safetensors", "sharded", "gguf", "gguf Q8_0"];

describe("loading a model", () => {
  for (const format of formats) {
    it(`of ${format} takes no second copy of it`, async () => {
      const folder = await Deno.makeTempDir({ prefix: "wkv_large_" });
      try {
        const path = await writeLargeModel(folder, format, LAYERS);
        const { code, stdout, stderr } = await execute(Deno.execPath(), [
          ...["run", "-A", "--no-prompt", "tests/load_memory.ts"],
          ...[await testLibrary(), `${ROOT}/tests/golden/models/llama`, path],
        ]);
        assertEquals(code, 0, stderr);
        const { before, peak, held, weights } = JSON.parse(stdout);
        // A copy would not fit the room.
        assertGreater(weights, 2 * ROOM);
        assert(held >= weights, `${held} bytes held for ${weights} of weights`);
        // The CPU library's memory is the process's, a GPU's is not.
        const own = testDevice === "cpu" ? held : 0;
        assertLess(
          peak - before - own,
          ROOM,
          `The peak is ${peak}, it was ${before} before, the library holds ${held}`,
        );
      } finally {
        await Deno.remove(folder, { recursive: true });
      }
    });
  }
});
