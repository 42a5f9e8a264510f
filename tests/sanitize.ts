/**
 * Builds the CPU library with address and undefined-behaviour checks and runs
 * the kernel tests, or the named ones, on it: `deno task sanitize [FILE...]`.
 * Needs g++ with its sanitizer libraries.
 *
 * There is no such run for data races: the checker does not see how Deno's own
 * threads hand work on, and reports each hand-over as a race.
 */

import { buildCpuLibrary } from "../src/backend/build.ts";

const tests = [
  "tests/abi_test.ts",
  "tests/cache_test.ts",
  "tests/kernels_test.ts",
  "tests/policies_test.ts",
  "tests/sampling_test.ts",
];

const root = new URL("../", import.meta.url);
const folder = decodeURIComponent(new URL("build/sanitize", root).pathname);
await Deno.mkdir(folder, { recursive: true });

// The build takes one word as its compiler: this one adds the flags.
const compiler = `${folder}/g++`;
await Deno.writeTextFile(
  compiler,
  '#!/bin/sh\nexec g++ "$@" -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined\n',
);
await Deno.chmod(compiler, 0o755);
const library = await buildCpuLibrary({
  folder,
  compiler,
  onStart: () => console.error("Building with checks, about two minutes"),
});

const preload: string[] = [];
for (const file of ["libasan.so", "libubsan.so"]) {
  const { stdout } = await new Deno.Command("g++", {
    args: [`-print-file-name=${file}`],
  }).output();
  preload.push(new TextDecoder().decode(stdout).trim());
}

const { code } = await new Deno.Command(Deno.execPath(), {
  args: [
    "test",
    "-A",
    "--no-prompt",
    "--no-check",
    ...(Deno.args.length > 0 ? Deno.args : tests),
  ],
  cwd: root,
  env: {
    WKV_LIB_CPU: library,
    LD_PRELOAD: preload.join(":"),
    // Deno handles its own signals and keeps memory to its end.
    ASAN_OPTIONS: "detect_leaks=0:handle_segv=0:abort_on_error=1",
    UBSAN_OPTIONS: "print_stacktrace=1",
  },
}).spawn().status;
Deno.exit(code);
