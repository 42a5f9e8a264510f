/** The command line's parts that need no process: options, prompts, progress, errors, help. */

import {
  assert,
  assertEquals,
  assertMatch,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { describe, it } from "@std/testing/bdd";
import { editDistance, nearest, readArguments } from "../cli/arguments.ts";
import type { Command } from "../cli/command.ts";
import { commands } from "../cli/commands.ts";
import { errorMessage, exitCode } from "../cli/errors.ts";
import { generateCommand } from "../cli/generate.ts";
import { commandHelp, shellQuote } from "../cli/help.ts";
import { type Input, readPrompt, readTextFile } from "../cli/input.ts";
import { checkPlatform } from "../cli/main.ts";
import { UsageError } from "../cli/option.ts";
import { perplexityCommand } from "../cli/perplexity.ts";
import { toFlags } from "../cli/permissions.ts";
import { Bar, ProgressView } from "../cli/progress.ts";
import type { Progress } from "../src/hub/progress.ts";
import type { Terminal } from "../cli/terminal.ts";
import { formatBytes, formatTable, formatTime } from "../cli/units.ts";
import { LibraryError, WkvError } from "../src/backend/error.ts";
import { FormatError } from "../src/formats/error.ts";

function read(...args: string[]): ReturnType<
  typeof readArguments<typeof generateCommand.options>
> {
  return readArguments(args, generateCommand.options);
}

describe("readArguments", () => {
  it("takes values behind a space, an equals sign or a letter", () => {
    const { values, operands } = read(
      "--budget",
      "64",
      "a",
      "--top-p=0.5",
      "-f",
      "x",
      "-mfile.gguf",
      "--json",
      "true",
    );
    assertEquals(values, {
      budget: 64,
      "top-p": 0.5,
      file: "x",
      model: "file.gguf",
      json: true,
    });
    assertEquals(operands, ["a", "true"]);
  });

  it("lets the last of one option count, and each --stop", () => {
    const { values } = read(
      "--max-tokens=300",
      "--stop",
      "a",
      "--max-tokens",
      "5",
      "--stop=-b=c\n",
    );
    assertEquals(values, { "max-tokens": 5, stop: ["a", "-b=c\n"] });
  });

  it("keeps operands as they are typed", () => {
    assertEquals(read("1e3").operands, ["1e3"]);
    assertEquals(read("-").operands, ["-"]);
    assertEquals(read("--", "--json", "--", "-x").operands, [
      "--json",
      "--",
      "-x",
    ]);
    assertEquals(read("").operands, [""]);
  });

  it("refuses what is no whole number", () => {
    for (
      const typed of [
        "1e3",
        "0x10",
        "1.5",
        "-1",
        "+1",
        "abc",
        " 5",
        "",
        "1_000",
        "٣",
        "NaN",
        "Infinity",
        "9007199254740992",
        "18446744073709551616",
      ]
    ) {
      for (const option of ["budget", "max-tokens", "seed", "sinks", "top-k"]) {
        assertThrows(() => read(`--${option}`, typed), UsageError, option);
      }
    }
    assertThrows(() => read("--budget", "0"), UsageError, "between 1 and");
    assertThrows(() => read("--budget", "1048577"), UsageError);
    assertThrows(() => read("--max-tokens", "0"), UsageError);
    assertEquals(read("--sinks", "0").values.sinks, 0);
    assertEquals(
      read("--seed", "9007199254740991").values.seed,
      Number.MAX_SAFE_INTEGER,
    );
  });

  it("refuses what is no number in range", () => {
    for (const typed of ["NaN", "nan", "Infinity", "-0.1", "0x1", "1,5", "."]) {
      assertThrows(
        () => read("--temperature", typed),
        UsageError,
        "a number between 0 and 1000",
      );
    }
    assertThrows(() => read("--top-p", "0"), UsageError, "above 0");
    assertThrows(() => read("--top-p", "1.01"), UsageError);
    assertThrows(() => read("--min-p", "2"), UsageError);
    assertEquals(read("--temperature", "8e-1").values.temperature, 0.8);
  });

  it("refuses unknown words and unwanted or missing values", () => {
    assertThrows(() => read("--device", "gpu"), UsageError, "auto, cpu, cuda");
    assertThrows(() => read("--prefill", "chunk:0"), UsageError, "chunk:N");
    assertThrows(() => read("--json=1"), UsageError, "takes no value");
    assertThrows(() => read("--model"), UsageError, "needs a value");
    assertThrows(() => read("--model="), UsageError, "needs a value");
    assertThrows(() => read("--stop", "--json"), UsageError, "needs a value");
    assertThrows(() => read("--model", "--"), UsageError, "needs a value");
  });

  it("reads layer budgets as a word, a number a layer or one a KV head", () => {
    const of = (typed: string) =>
      read("--layer-budgets", typed).values["layer-budgets"];
    assertEquals(of("inverse"), "inverse");
    assertEquals(of("512,64,192"), [512, 64, 192]);
    assertEquals(of("512/64,192"), [[512, 64], 192]);
    assertEquals(of("3/1"), [[3, 1]]);
    for (
      const typed of [
        "512",
        "1/,2",
        "1//2,3",
        "1,,2",
        "1,2,",
        "1, 2",
        "-1,2",
        "1.5,2",
        "x",
      ]
    ) {
      assertThrows(() => of(typed), UsageError, "a whole number a layer");
    }
  });

  it("suggests the nearest option", () => {
    assertThrows(() => read("--buget", "3"), UsageError, "mean --budget?");
    assertThrows(() => read("--temp=1"), UsageError, "mean --temperature?");
    assertThrows(
      () => read("--max_tokens=1"),
      UsageError,
      "mean --max-tokens?",
    );
    const error = assertThrows(() => read("--xyzzy"), UsageError, "--xyzzy");
    assert(!(error as Error).message.includes("mean"));
    assertThrows(() => read("--__proto__=1"), UsageError, "Unknown option");
    assertThrows(() => read("--constructor"), UsageError, "Unknown option");
    assertThrows(() => read("-x"), UsageError, "behind --");
    assertThrows(() => read("- a list item"), UsageError, "behind --");
  });

  it("takes lists of policies and budgets", () => {
    const { values } = readArguments(
      ["--policy=full,weighted-kv-ward:linear", "--budget", "16,32"],
      perplexityCommand.options,
    );
    assertEquals(values, {
      policy: ["full", "weighted-kv-ward:linear"],
      budget: [16, 32],
    });
    for (const typed of ["16,", ",16", "16;32", "16,-1"]) {
      assertThrows(
        () => readArguments(["--budget", typed], perplexityCommand.options),
        UsageError,
      );
    }
    assertThrows(
      () => readArguments(["--policy", "full,"], perplexityCommand.options),
      UsageError,
    );
  });
});

describe("nearest", () => {
  it("counts edits", () => {
    assertEquals(editDistance("kitten", "sitting"), 3);
    assertEquals(editDistance("", "abc"), 3);
    assertEquals(editDistance("abc", "abc"), 0);
  });

  it("finds close names alone", () => {
    const names = Object.keys(commands);
    assertEquals(nearest("genrate", names), "generate");
    assertEquals(nearest("perp", names), "perplexity");
    assertEquals(nearest("buidl", names), "build");
    assertEquals(nearest("serve", names), undefined);
    assertEquals(nearest("x".repeat(10_000), names), undefined);
  });
});

function input(kind: Input["kind"], content: string | Uint8Array = ""): Input {
  return { kind, readable: new Response(content as BodyInit).body! };
}

describe("readPrompt", () => {
  it("takes the argument, a pipe, or both with a newline between", async () => {
    const terminal = input("terminal");
    assertEquals(await readPrompt("a b", undefined, terminal), "a b");
    assertEquals(
      await readPrompt(undefined, undefined, input("pipe", "p\n")),
      "p\n",
    );
    assertEquals(await readPrompt("a", undefined, input("pipe", "p")), "p\na");
    assertEquals(
      await readPrompt("a", undefined, input("pipe", "p\n")),
      "p\na",
    );
    assertEquals(await readPrompt("a", undefined, input("pipe")), "a");
    assertEquals(await readPrompt("-", undefined, input("terminal", "t")), "t");
  });

  it("leaves a socket alone beside an argument", async () => {
    const open: Input = { kind: "socket", readable: new ReadableStream() };
    assertEquals(await readPrompt("a", undefined, open), "a");
    assertEquals(
      await readPrompt(undefined, undefined, input("socket", "s")),
      "s",
    );
  });

  it("reads a file, byte order mark included", async () => {
    const path = await Deno.makeTempFile();
    try {
      await Deno.writeTextFile(path, "\ufeffé\n");
      const none = input("pipe", "unread");
      assertEquals(await readPrompt(undefined, path, none), "\ufeffé\n");
      assertEquals(await readPrompt("a", path, none), "\ufeffé\na");
      assertEquals(await readPrompt(undefined, "-", input("pipe", "x")), "x");
    } finally {
      await Deno.remove(path);
    }
  });

  it("refuses an empty prompt, and text that is not UTF-8", async () => {
    const terminal = input("terminal");
    await assertRejects(
      () => readPrompt(undefined, undefined, terminal),
      UsageError,
      "empty",
    );
    await assertRejects(() => readPrompt("", undefined, terminal), UsageError);
    await assertRejects(
      () => readPrompt("", undefined, input("pipe")),
      UsageError,
    );
    for (
      const [bytes, at] of [
        [[0x61, 0x62, 0xff, 0x63], 2],
        [[0xff], 0],
        [[0x61, 0xe2, 0x82], 1],
      ] as const
    ) {
      await assertRejects(
        () => readTextFile("-", input("pipe", Uint8Array.from(bytes))),
        SyntaxError,
        `standard input: byte ${at}`,
      );
    }
  });

  it("ends when it is aborted", async () => {
    const abort = new AbortController();
    const endless: Input = { kind: "pipe", readable: new ReadableStream() };
    const reading = readTextFile("-", endless, abort.signal);
    abort.abort();
    const error = await assertRejects(() => reading);
    assertEquals(error, abort.signal.reason);
  });
});

/** A terminal that keeps what is written to standard error. */
function fakeTerminal(
  bars: boolean,
  columns = 60,
): Terminal & { text: string } {
  const terminal = {
    text: "",
    out: { isTerminal: false, write: () => Promise.resolve() },
    err: {
      isTerminal: bars,
      bars,
      columns,
      writeNow: (text: string): void => {
        terminal.text += text;
      },
      write: (text: string): Promise<void> => {
        terminal.text += text;
        return Promise.resolve();
      },
    },
  };
  return terminal;
}

/** What a terminal shows of a text with returns, line ends, and the sequences that bars take. */
class Screen {
  lines = [""];
  #row = 0;
  #column = 0;

  write(text: string): void {
    // deno-lint-ignore no-control-regex -- they are what is written
    for (const part of text.match(/\x1b\[\d*[AJK]|\r|\n|[^\x1b\r\n]+/g) ?? []) {
      const line = this.lines[this.#row]!;
      if (part === "\r") this.#column = 0;
      else if (part === "\n") {
        this.#row++;
        this.#column = 0;
        if (this.#row === this.lines.length) this.lines.push("");
      } else if (part.endsWith("A") && part.startsWith("\x1b")) {
        this.#row -= Number(part.slice(2, -1));
      } else if (part === "\x1b[K") {
        this.lines[this.#row] = line.slice(0, this.#column);
      } else if (part === "\x1b[J") {
        this.lines[this.#row] = line.slice(0, this.#column);
        this.lines.length = this.#row + 1;
      } else {
        this.lines[this.#row] = line.slice(0, this.#column) + part +
          line.slice(this.#column + part.length);
        this.#column += part.length;
      }
    }
  }
}

describe("ProgressView", () => {
  const download = { stage: "download", label: "m.gguf", total: 4096 } as const;

  it("says start and end of a download and a build without a terminal", () => {
    const terminal = fakeTerminal(false);
    const view = new ProgressView(terminal, false);
    view.report({ ...download, loaded: 0 });
    view.report({ ...download, loaded: 2048 });
    view.report({ ...download, loaded: 4096 });
    const build = {
      stage: "build",
      label: "b",
      loaded: 0,
      total: null,
    } as const;
    view.report({ ...build, note: "Building" });
    view.report({ stage: "load", label: "m", loaded: 1, total: 2 });
    view.close();
    assertMatch(
      terminal.text,
      /^Downloading m\.gguf \(4\.0 KiB\)\nDownloaded m\.gguf in \d+ ms\nBuilding\nBuilt in \d+ ms\n$/,
    );
  });

  it("draws over one line on a terminal and takes it away", () => {
    const terminal = fakeTerminal(true, 40);
    const view = new ProgressView(terminal, false);
    view.report({ stage: "load", label: "model", loaded: 1, total: 2 });
    assertStringIncludes(terminal.text, "Loading mode [############");
    for (const line of terminal.text.split("\r\x1b[K")) {
      assert(line.length < 40);
    }
    view.close();
    assert(terminal.text.endsWith("\r\x1b[K"));
  });

  /** Reports of a pull of two files, the first of which is here. */
  function* pull(): Generator<Progress> {
    const report = (
      stage: Progress["stage"],
      index: number,
      loaded: number,
      all: number,
    ): Progress => ({
      stage,
      label: "hf:o/r",
      loaded: all,
      total: 3 * 4096,
      file: {
        ...{ name: `q/part${index}.gguf`, index, count: 3 },
        ...{ loaded, total: 4096 },
      },
    });
    yield report("verify", 1, 2048, 2048);
    yield { ...report("verify", 1, 4096, 4096), note: "part1 is here" };
    for (const index of [2, 3]) {
      const before = 4096 * (index - 1);
      yield report("download", index, 0, before);
      yield report("download", index, 2048, before + 2048);
      yield report("download", index, 4096, before + 4096);
      yield report("verify", index, 4096, before + 4096);
    }
  }

  it("has a line a file of several without a terminal", () => {
    const terminal = fakeTerminal(false);
    const view = new ProgressView(terminal, false);
    for (const report of pull()) view.report(report);
    view.report({ stage: "load", label: "m", loaded: 1, total: 2 });
    view.close();
    assertMatch(
      terminal.text,
      /^part1 is here\nDownloading hf:o\/r \(3 files, 12\.0 KiB\)\nq\/part2\.gguf \(2 of 3\): 4\.0 KiB in \d+ ms\nq\/part3\.gguf \(3 of 3\): 4\.0 KiB in \d+ ms\nDownloaded hf:o\/r in \d+ ms\n$/,
    );
    const quiet = fakeTerminal(true);
    const silent = new ProgressView(quiet, true);
    for (const report of pull()) silent.report(report);
    silent.close();
    assertEquals(quiet.text, "");
  });

  it("draws a bar a file and one of all on a terminal, and leaves a line a file", async () => {
    const terminal = fakeTerminal(true, 90);
    const view = new ProgressView(terminal, false);
    for (const report of pull()) {
      view.report(report);
      // Longer than two drawings are apart.
      await new Promise((resolve) => setTimeout(resolve, 90));
    }
    const screen = new Screen();
    screen.write(terminal.text);
    const bar = (full: number) => `[${"#".repeat(full).padEnd(24, "-")}]`;
    assertEquals(screen.lines, [
      "part1 is here",
      screen.lines[1]!,
      `Verifying part3.gguf ${bar(24)} 100% 4.0 KiB of 4.0 KiB`,
      `3 of 3 files ${bar(24)} 100% 12.0 KiB of 12.0 KiB`,
    ]);
    const done = /^part2\.gguf \[#{24}\] 100% 4\.0 KiB in \d+ ms$/;
    assertMatch(screen.lines[1]!, done);
    // In between: half of the second file, half of all.
    assertStringIncludes(
      terminal.text,
      `Downloading part2.gguf ${
        bar(12)
      }  50% 2.0 KiB of 4.0 KiB\n\r\x1b[K2 of 3 files ${
        bar(12)
      }  50% 6.0 KiB of 12.0 KiB, `,
    );
    view.close();
    const end = new Screen();
    end.write(terminal.text);
    assertEquals(end.lines.length, 5);
    assertMatch(end.lines[1]!, done);
    assertMatch(end.lines[2]!, /^part3\.gguf \[#{24}\] 100% /);
    assertMatch(end.lines[3]!, /^Downloaded hf:o\/r in /);
    assertEquals(end.lines[4], "");
  });

  it("takes both bars away when a pull fails", () => {
    const terminal = fakeTerminal(true, 70);
    {
      using view = new ProgressView(terminal, false);
      for (const report of [...pull()].slice(2, 4)) view.report(report);
    }
    const screen = new Screen();
    screen.write(terminal.text);
    assertEquals(screen.lines, [""]);
  });

  it("says notes, and after a failure not that it is done", () => {
    const terminal = fakeTerminal(false);
    {
      using view = new ProgressView(terminal, false);
      view.report({ ...download, loaded: 0, note: "Waiting" });
    }
    assertEquals(terminal.text, "Waiting\n");
  });

  it("is silent when quiet", () => {
    const terminal = fakeTerminal(true);
    const view = new ProgressView(terminal, true);
    view.report({ ...download, loaded: 0, note: "Waiting" });
    view.close();
    assertEquals(terminal.text, "");
  });

  it("draws no bar where there are none", () => {
    const terminal = fakeTerminal(false);
    const bar = new Bar(terminal.err);
    bar.draw("Perplexity", 0.5, "1 s left");
    bar.clear();
    assertEquals(terminal.text, "");
  });
});

describe("units", () => {
  it("formats bytes and times", () => {
    assertEquals(formatBytes(1023), "1023 B");
    assertEquals(formatBytes(1024), "1.0 KiB");
    assertEquals(formatBytes(98_362_432), "93.8 MiB");
    assertEquals(formatBytes(180 * 2 ** 20), "180 MiB");
    assertEquals(formatBytes(1023 * 2 ** 20), "1.0 GiB");
    assertEquals(formatTime(12.4), "12 ms");
    assertEquals(formatTime(999.9), "1.0 s");
    assertEquals(formatTime(61_000), "1 min 1 s");
    assertEquals(formatTime(3_720_000), "1 h 2 min");
  });

  it("sets columns", () => {
    assertEquals(
      formatTable(["name", "size"], [["a", "5"], ["longer", "123456"]], [
        "size",
      ]),
      "name      size\na            5\nlonger  123456\n",
    );
  });
});

describe("errors", () => {
  it("have the exit codes of the contract", () => {
    for (
      const error of [
        new TypeError(),
        new RangeError(),
        new UsageError(),
        new SyntaxError(),
        new FormatError("f", "g", "h"),
        new Deno.errors.NotFound(),
        new Deno.errors.PermissionDenied(),
        new Deno.errors.IsADirectory(),
        new Deno.errors.NotADirectory(),
      ]
    ) assertEquals(exitCode(error), 2, error.name);
    for (
      const error of [
        new Error(),
        new WkvError("wkv_attend", 3, "no"),
        new LibraryError("no", []),
        new Deno.errors.NotCapable(),
        "text",
      ]
    ) assertEquals(exitCode(error), 1);
  });

  it("turn a missing permission into its flag", () => {
    const refused = (text: string) =>
      errorMessage(new Deno.errors.NotCapable(text));
    assertStringIncludes(
      refused(
        'Requires read access to "/a b", run again with the --allow-read flag',
      ),
      "--allow-read=/a b ",
    );
    assertStringIncludes(
      refused(
        "Requires ffi access to <dir>, run again with the --allow-ffi flag",
      ),
      "--allow-ffi ",
    );
    assertEquals(refused("run with --allow-ffi=/x"), "run with --allow-ffi=/x");
  });

  it("refuse systems other than Linux", () => {
    checkPlatform("linux");
    for (const os of ["darwin", "windows"]) {
      assertThrows(() => checkPlatform(os), Error, "Linux only so far");
    }
  });
});

describe("help", () => {
  it("names every option of every command, and permissions", async () => {
    for (const [name, { load }] of Object.entries(commands)) {
      const command: Command = await load();
      const help = await commandHelp(name, command, {}, []);
      for (
        const [option, { summary, short }] of Object.entries(command.options)
      ) {
        assertStringIncludes(help, `--${option}`);
        assertStringIncludes(help, summary);
        if (short) assertStringIncludes(help, `-${short}, --${option}`);
      }
      assertStringIncludes(help, "Permissions on this machine:");
      const letters = Object.values(command.options).map(({ short }) => short)
        .filter((short) => short !== undefined);
      assertEquals(new Set(letters).size, letters.length, name);
    }
  });

  it("writes permissions as a shell takes them", () => {
    assertEquals(
      toFlags(
        [{ read: ["/a", "/b,c"], env: ["X"] }, { read: ["/a"], net: [] }],
        ["--allow-ffi=/d,,e", "--allow-env=Y,Z"],
      ),
      [
        "--allow-env=X,Y,Z",
        "--allow-ffi=/d,,e",
        "--allow-net",
        "--allow-read=/a,/b,,c",
      ],
    );
    assertEquals(
      shellQuote("--allow-read=/a b'c"),
      "'--allow-read=/a b'\\''c'",
    );
  });
});
