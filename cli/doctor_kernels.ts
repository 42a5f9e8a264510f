/** `wkv doctor --self-test`: runs the kernels on this machine and prints how far each quantity is from f64. */

import { Backend, type Device } from "../src/backend/backend.ts";
import { selfTest, type WorstFinding } from "../src/selftest/mod.ts";
import type { Terminal } from "./terminal.ts";

/** How long rows are started; the last one may take a second more. */
const SECONDS = 55;

/**
 * Runs it and prints what it found.
 *
 * @returns The exit code: 1 when an error is over its limit.
 */
export async function runSelfTest(
  device: Device,
  { terminal, signal, json }: {
    terminal: Terminal;
    signal: AbortSignal;
    json: boolean;
  },
): Promise<number> {
  using backend = await Backend.open({ device, build: false });
  const result = await selfTest(backend, { seconds: SECONDS, signal });
  if (json) {
    await terminal.out.write(`${
      JSON.stringify(result, (_, value) =>
        // JSON has no Infinity.
        typeof value === "number" && !Number.isFinite(value)
          ? String(value)
          : value)
    }\n`);
    return result.ok ? 0 : 1;
  }
  const { cases, table, seconds, worst, failures } = result;
  const width = Math.max(...worst.map(({ quantity }) => quantity.length));
  const line = (
    { ok, quantity, error, limit, cases, case: row }: WorstFinding,
  ) =>
    `${ok ? "ok  " : "over"}  ${quantity.padEnd(width)}  ${number(error)}  ${
      number(limit)
    }  ${String(cases).padStart(5)}  ${error === 0 ? "" : row}`.trimEnd() +
    "\n";
  await terminal.out.write(
    [
      `${result.device}\n`,
      `${cases} of ${table} cases against f64 in ${seconds.toFixed(1)} s\n\n`,
      `      ${"quantity".padEnd(width)}  ${"worst".padEnd(8)}  ${
        "limit".padEnd(8)
      }  cases  the worst one\n`,
      ...worst.map(line),
      ...failures.map((failure) =>
        `fail  ${failure.case}: ${failure.thrown}\n`
      ),
      result.ok
        ? "\nEvery error is within its limit.\n"
        : "\nThis device computes wrongly: see what is over.\n",
    ].join(""),
  );
  return result.ok ? 0 : 1;
}

function number(x: number): string {
  return (x === 0 || x === Infinity ? String(x) : x.toExponential(1))
    .padEnd(8);
}
