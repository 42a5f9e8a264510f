/** The frame of a result file, what bench/results/*.json says of how it came about. */

import { Backend } from "../src/backend/backend.ts";
import type { LibraryKind } from "../src/backend/build.ts";

/** What a result file says of how it came about. */
export interface Frame {
  /** Which library was measured. */
  library: LibraryKind;
  /** Hash of the sources it was built from. */
  kernels: string;
  /** The processor. */
  cpu: string;
  /** Cores this process may use. */
  cores: number;
  /** The GPU, where the library runs on one. */
  gpu?: string;
  /** Its driver's version. */
  driver?: string;
  /** When it was measured. */
  date: string;
  /** The command that repeats it. */
  command: string;
}

/**
 * The frame of a run that starts now, on an open library or, where other
 * processes measure, on one of its kind, which they open as this does.
 */
export async function frame(
  command: string,
  measured: LibraryKind | Backend,
): Promise<Frame> {
  if (typeof measured === "string") {
    using backend = await Backend.open({ device: measured });
    return await frame(command, backend);
  }
  const { device: library, sourceHash: kernels } = measured;
  return {
    library,
    kernels,
    cpu: await cpu() ?? Deno.build.arch,
    cores: navigator.hardwareConcurrency,
    ...(library === "cuda" ? await gpu() : {}),
    date: new Date().toISOString().slice(0, 10),
    command,
  };
}

/** Writes a result file anew, whole or not at all. */
export async function writeResult(
  path: string,
  result: Frame & Record<string, unknown>,
): Promise<void> {
  const next = `${path}.${Deno.pid}`;
  // A row a line: files stay small, and a change shows as the rows it changed.
  const fields = Object.entries(result).map(([key, value]) =>
    Array.isArray(value) && value.length > 0
      ? `${JSON.stringify(key)}: [\n${
        value.map((row) => `    ${JSON.stringify(row)}`).join(",\n")
      }\n  ]`
      : `${JSON.stringify(key)}: ${JSON.stringify(value)}`
  );
  await Deno.writeTextFile(next, `{\n  ${fields.join(",\n  ")}\n}\n`);
  await Deno.rename(next, path);
}

/** The processor's name; null where it is not told, which takes all permissions. */
async function cpu(): Promise<string | null> {
  try {
    const info = await Deno.readTextFile("/proc/cpuinfo");
    return /model name\s*:\s*(.*)/.exec(info)?.[1] ?? null;
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) return null;
    throw error;
  }
}

async function gpu(): Promise<{ gpu?: string; driver?: string }> {
  try {
    const { stdout } = await new Deno.Command("nvidia-smi", {
      args: ["--query-gpu=name,driver_version", "--format=csv,noheader"],
      stderr: "null",
    }).output();
    const [gpu = "", driver = ""] = new TextDecoder().decode(stdout)
      .split("\n")[0]!.split(", ");
    return gpu ? { gpu, driver } : {};
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return {};
    throw error;
  }
}
