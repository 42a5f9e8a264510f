/** The self-test of `wkv doctor`: rows of the table of kernel cases on the user's own device. */

import type { Backend } from "../backend/backend.ts";
import {
  caseName,
  isHuge,
  isLarge,
  type KernelCase,
  kernelCases,
  runCase,
} from "./cases.ts";
import { type Finding, share } from "./findings.ts";
import { Random } from "./numbers.ts";

/** The worst of one quantity over all rows that ran. */
export interface WorstFinding extends Finding {
  /** Whether it is within its limit. */
  readonly ok: boolean;
  /** Rows that measured it. */
  readonly cases: number;
  /** The row that it comes from. */
  readonly case: string;
}

/** What a self-test found. */
export interface SelfTest {
  /** Whether every error is within its limit and no row failed otherwise. */
  readonly ok: boolean;
  /** The device in words. */
  readonly device: string;
  /** Rows that ran. */
  readonly cases: number;
  /** Rows that there were. */
  readonly table: number;
  /** How long it took. */
  readonly seconds: number;
  /** The worst of each quantity. */
  readonly worst: readonly WorstFinding[];
  /** Rows that threw. */
  readonly failures: readonly {
    readonly case: string;
    readonly thrown: string;
  }[];
}

/**
 * Runs the rows, all of the table unless said, in an order that mixes the
 * kernels and is always the same, until `seconds` have passed or all have run;
 * large ones come last, and the CPU leaves the huge ones out.
 */
export async function selfTest(
  backend: Backend,
  { seconds, rows: all = kernelCases, signal, onCase }: {
    seconds: number;
    rows?: readonly KernelCase[];
    signal?: AbortSignal;
    onCase?: (name: string, findings: readonly Finding[]) => void;
  },
): Promise<SelfTest> {
  const start = performance.now();
  const passed = () => (performance.now() - start) / 1000;
  const random = new Random(1);
  const onCpu = backend.device === "cpu";
  const rows = all.filter((row) => !(onCpu && isHuge(row))).map((row) => ({
    row,
    place: random.uniform() + Number(isLarge(row)) + Number(isHuge(row)),
  })).sort((a, b) => a.place - b.place);
  const worst = new Map<string, WorstFinding>();
  const failures: { case: string; thrown: string }[] = [];
  let cases = 0;
  for (const { row } of rows) {
    if (passed() > seconds) break;
    signal?.throwIfAborted();
    const name = caseName(row);
    cases++;
    let findings: Finding[] = [];
    try {
      findings = await runCase(backend, row);
    } catch (error) {
      failures.push({ case: name, thrown: String(error) });
    }
    onCase?.(name, findings);
    for (const finding of findings) {
      const { quantity, error, limit } = finding;
      const before = worst.get(quantity);
      const isWorse = before === undefined || share(finding) > share(before);
      worst.set(quantity, {
        ...(isWorse ? { ...finding, ok: error <= limit, case: name } : before),
        cases: (before?.cases ?? 0) + 1,
      });
    }
  }
  const list = [...worst.values()].sort((a, b) => share(b) - share(a));
  return {
    ok: failures.length === 0 && list.every(({ ok }) => ok),
    device: backend.description,
    cases,
    table: rows.length,
    seconds: passed(),
    worst: list,
    failures,
  };
}
