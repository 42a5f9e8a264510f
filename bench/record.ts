/** What every benchmark shares: medians, and the frame of a result file. */

import { sourceHash } from "../src/backend/build.ts";

/** The middle of some numbers. */
export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2
    ? sorted[half]!
    : (sorted[half - 1]! + sorted[half]!) / 2;
}

/** What a result file says of how it came about. */
export interface Frame {
  /** Hash of the kernels' sources. */
  kernels: string;
  /** The processor. */
  cpu: string;
  /** Cores this process may use. */
  cores: number;
  /** When it was measured. */
  date: string;
  /** The command that repeats it. */
  command: string;
}

/** The frame of a run that starts now. */
export async function frame(command: string): Promise<Frame> {
  const info = await Deno.readTextFile("/proc/cpuinfo");
  return {
    kernels: await sourceHash(),
    cpu: /model name\s*:\s*(.*)/.exec(info)?.[1] ?? Deno.build.arch,
    cores: navigator.hardwareConcurrency,
    date: new Date().toISOString().slice(0, 10),
    command,
  };
}
