/**
 * The one timing helper of every benchmark: wall clocks around runs that are
 * long enough, and what is said of the samples.
 */

import type { Graph } from "../src/backend/backend.ts";

/** The value below which this share of some numbers lies, between two of them interpolated. */
export function quantile(values: readonly number[], share: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  const at = (sorted.length - 1) * share;
  const low = sorted[Math.floor(at)]!;
  return low + (sorted[Math.ceil(at)]! - low) * (at % 1);
}

/** The middle of some numbers. */
export function median(values: readonly number[]): number {
  return quantile(values, 0.5);
}

/** Some numbers to five digits, as result files keep them. */
export function rounded(values: readonly number[]): number[] {
  return values.map((value) => Number(value.toPrecision(5)));
}

/** Milliseconds of each of `repeats` runs; `before` is not timed. */
export async function timeRuns(
  repeats: number,
  run: () => Promise<unknown>,
  before: () => Promise<void> | void = () => {},
): Promise<number[]> {
  const samples: number[] = [];
  for (let i = 0; i < repeats; i++) {
    await before();
    const start = performance.now();
    await run();
    samples.push(performance.now() - start);
  }
  return samples;
}

/** How a graph is timed. */
export interface GraphTimeOptions {
  /** Samples. */
  repeats: number;
  /** Milliseconds that a sample must take: the call and its one wait count for about 0.05 ms. */
  least: number;
  /** The most runs of the graph in a sample. @default `65536` */
  most?: number | undefined;
  /** Called before each sample, untimed. */
  before?: (() => Promise<void> | void) | undefined;
}

/** A graph's time. */
export interface GraphTime {
  /** Runs of the graph in a sample. */
  times: number;
  /** Milliseconds of one run of the graph, by sample. */
  samples: number[];
}

/**
 * Times a graph by a wall clock around `times` runs that one call starts one
 * behind the other, with one wait at their end.
 */
export async function timeGraph(
  graph: Graph,
  { repeats, least, most = 65536, before }: GraphTimeOptions,
): Promise<GraphTime> {
  // The first run warms up, a second one and a few more say how many are enough.
  await timeRuns(1, () => graph.run(), before);
  const once = Math.min(...await timeRuns(2, () => graph.run(), before));
  const some = Math.max(1, Math.min(most, Math.ceil(least / 4 / once)));
  const [few] = await timeRuns(1, () => graph.run(some), before);
  const times = Math.max(1, Math.min(most, Math.ceil(least / (few! / some))));
  const samples = await timeRuns(repeats, () => graph.run(times), before);
  return { times, samples: samples.map((ms) => ms / times) };
}
