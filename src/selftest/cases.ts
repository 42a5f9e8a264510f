/**
 * The table of kernel cases, and how one is run: `wkv doctor --self-test`,
 * kernels_test.ts, cuda_check.ts and the sanitizers all read it.
 */

import type { Backend } from "../backend/backend.ts";
import { cacheCases, type CacheRow } from "./cache_cases.ts";
import type { Finding } from "./findings.ts";
import { Random } from "./numbers.ts";
import { type OpCase, opCases } from "./op_cases.ts";
import { type RefusalCase, refusalCases, runRefusal } from "./refusals.ts";
import { runCacheCase } from "./run_cache.ts";
import { runOpCase } from "./run_ops.ts";

/** One row of the table. */
export type KernelCase = OpCase | CacheRow | RefusalCase;

/** The table. */
export const kernelCases: readonly KernelCase[] = [
  ...cacheCases,
  ...opCases,
  ...refusalCases,
];

/** A row's name, such as `linear dtype Q8_0 rows 3`. */
export function caseName(row: KernelCase): string {
  return Object.entries(row).map(([key, value]) => {
    if (key === "kernel") return value;
    return value === true ? key : `${key} ${value}`;
  }).join(" ");
}

/** Runs a row on a library and gives the worst of each quantity; the same row has the same inputs. */
export async function runCase(
  backend: Backend,
  row: KernelCase,
): Promise<Finding[]> {
  const random = new Random(seedOf(caseName(row)));
  switch (row.kernel) {
    case "refusal":
      return runRefusal(backend, row);
    case "attend":
    case "insert":
    case "prefill":
    case "repeat":
    case "graph":
      return await runCacheCase(backend, row, random);
    default:
      return runOpCase(backend, row, random);
  }
}

/** A number for a name (FNV-1a). */
function seedOf(name: string): number {
  let hash = 0x811c9dc5;
  for (let i = 0; i < name.length; i++) {
    hash = Math.imul(hash ^ name.charCodeAt(i), 0x01000193);
  }
  return hash | 0;
}
