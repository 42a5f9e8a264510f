/**
 * The table of kernel cases, and how one is run: `wkv doctor --self-test`,
 * kernels_test.ts, cuda_check.ts and the sanitizers all read it, and
 * bench/kernels.ts says which of its rows it timed.
 */

import type { Backend } from "../backend/backend.ts";
import { isQuantised } from "../backend/tensor.ts";
import { cacheCases, type CacheRow } from "./cache_cases.ts";
import type { Finding } from "./findings.ts";
import { Random } from "./numbers.ts";
import { modelCacheCases, modelOpCases } from "./model_cases.ts";
import { type OpCase, opCases } from "./op_cases.ts";
import { type RefusalCase, refusalCases, runRefusal } from "./refusals.ts";
import { runCacheCase } from "./run_cache.ts";
import { runOpCase } from "./run_ops.ts";

/** One row of the table. */
export type KernelCase = OpCase | CacheRow | RefusalCase;

/** The table. */
export const kernelCases: readonly KernelCase[] = [
  ...cacheCases,
  ...modelCacheCases,
  ...opCases,
  ...modelOpCases,
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
      return await runOpCase(backend, row, random);
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

/** Whether a row takes about a second, most of it in f64. */
export function isLarge(row: KernelCase): boolean {
  if ("times" in row) return row.times * row.budget > 5000;
  if (isHuge(row)) return true;
  if (row.kernel === "chain") return row.width * row.hidden > 1e5;
  if ("outputs" in row) return row.rows * row.columns * row.outputs > 2e6;
  return "budget" in row && row.budget * row.headDim * row.sequences > 3e5;
}

/** Whether a row takes the CPU seconds, as some of a model's own sizes do. */
export function isHuge(row: KernelCase): boolean {
  if ("columns" in row && "outputs" in row) {
    return row.outputs * row.columns > 2e7;
  }
  if ("budget" in row && row.budget > 1e5) return true;
  // No other row has this many KV heads.
  return row.kernel === "attend" && row.kvHeads >= 8 &&
    row.budget * row.headDim * row.kvHeads * row.sequences > 2e6;
}

/** A few tiny rows that reach every kernel in every type, for tools that are slow. */
export function tinyCases(): KernelCase[] {
  const chosen = new Map<string, KernelCase>();
  for (const row of kernelCases) {
    const name = kindOf(row);
    if (name !== null && !chosen.has(name)) chosen.set(name, row);
  }
  return [...chosen.values()];
}

/** What a tiny row stands for; null when it is not tiny, or of no kernel. */
function kindOf(row: KernelCase): string | null {
  const { kernel } = row;
  switch (kernel) {
    case "attend":
    case "insert":
      if (row.budget < 8 || row.budget > 513) return null;
      if (row.budget * row.headDim * row.sequences > 4e4) return null;
      if (kernel === "insert") return kernel;
      return `${kernel} ${row.victims ?? `${row.cacheType} ${row.positions}`}`;
    case "prefill":
      if (row.passes.some((rows) => rows > 129)) return null;
      if (!row.passes.some((rows) => rows > 60)) return null;
      if (row.budget > 130) return null;
      return `${kernel} ${row.cacheType} ${row.positions} ${
        row.scoreCap ?? row.window ? "bent" : "plain"
      }`;
    case "linear": {
      if (row.columns < 96) return null;
      const size = row.rows > 8 ? "many" : "few";
      if (!isQuantised(row.dtype)) return `${kernel} ${row.dtype} ${size}`;
      const other = row.rows > 8 ? "f32" : "int8";
      if (row.precision !== other && row.dtype !== "Q8_0") return null;
      return `${kernel} ${row.dtype} ${row.precision} ${size}`;
    }
    case "gated":
      if (row.activation === "gelu-tanh") return null;
      if (row.dtype !== "Q4_1" || row.rows < 2 || row.outputs < 7) return null;
      return `${kernel} ${row.precision}`;
    case "chain":
      return row.width > 256 ? null : `${kernel} ${row.dtypes}`;
    case "sample":
      if (row.vocabulary !== 1000) return null;
      return `${kernel} ${row.temperature > 0}`;
    case "logProb":
    case "divergence":
      return row.rows > 1 && row.vocabulary === 33 ? kernel : null;
    case "qkNorm":
    case "softcap":
      return row.rows > 1 ? `${kernel} ${"all" in row && row.all}` : null;
    case "rmsnorm":
      return row.rows > 1 && row.columns === 31 ? kernel : null;
    case "embed":
      return row.rows > 1 ? kernel : null;
    default:
      return null;
  }
}
