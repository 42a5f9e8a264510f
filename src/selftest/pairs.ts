/** Few rows that hold every pair of values of some parameters; the table of cache cases is made of them. */

import { Random } from "./numbers.ts";

/** A list of values for each parameter. */
export type Parameters = Readonly<Record<string, readonly unknown[]>>;

/** One value of each parameter. */
export type Row<P extends Parameters> = { [K in keyof P]: P[K][number] };

/**
 * Rows in which every two values of different parameters meet at least once,
 * but for those that `allowed` refuses; it must refuse no row for a value that
 * is still absent. The same arguments give the same rows.
 */
export function pairwise<const P extends Parameters>(
  parameters: P,
  allowed: (row: Partial<Row<P>>) => boolean,
  seed: number,
): Row<P>[] {
  const random = new Random(seed);
  const names = Object.keys(parameters);
  const open = new Set<string>();
  const key = (a: number, i: number, b: number, j: number) =>
    a < b ? `${a} ${i} ${b} ${j}` : `${b} ${j} ${a} ${i}`;
  const values = names.map((name) => parameters[name]!);
  values.forEach((left, a) =>
    values.slice(0, a).forEach((right, b) =>
      left.forEach((_, i) =>
        right.forEach((_, j) => {
          if (isAllowed(new Map([[a, i], [b, j]]))) open.add(key(a, i, b, j));
        })
      )
    )
  );
  const rows: Row<P>[] = [];
  while (open.size > 0) {
    const best = Array.from({ length: 12 }, grow)
      .reduce((a, b) => gain(b) > gain(a) ? b : a);
    for (const pair of pairsOf(best)) open.delete(pair);
    rows.push(rowOf(best) as Row<P>);
  }
  return rows;

  /** A row around one open pair, each other value the one that covers most. */
  function grow(): Map<number, number> {
    const pairs = [...open];
    const [a, i, b, j] = pairs[random.integer(pairs.length)]!.split(" ")
      .map(Number) as [number, number, number, number];
    const row = new Map([[a, i], [b, j]]);
    const rest = names.map((_, c) => c).filter((c) => !row.has(c));
    while (rest.length > 0) {
      const [c] = rest.splice(random.integer(rest.length), 1) as [number];
      let most = -1, chosen = 0;
      const first = random.integer(values[c]!.length);
      for (let n = 0; n < values[c]!.length; n++) {
        const v = (first + n) % values[c]!.length;
        if (!isAllowed(new Map([...row, [c, v]]))) continue;
        let count = 0;
        for (const [d, w] of row) if (open.has(key(c, v, d, w))) count++;
        if (count > most) [most, chosen] = [count, v];
      }
      row.set(c, chosen);
    }
    return row;
  }

  function pairsOf(row: Map<number, number>): string[] {
    const entries = [...row];
    return entries.flatMap(([a, i], n) =>
      entries.slice(0, n).map(([b, j]) => key(a, i, b, j))
    );
  }

  function gain(row: Map<number, number>): number {
    return pairsOf(row).filter((pair) => open.has(pair)).length;
  }

  function rowOf(row: Map<number, number>): Partial<Row<P>> {
    return Object.fromEntries(
      [...row].map(([c, v]) => [names[c]!, values[c]![v]]),
    ) as Partial<Row<P>>;
  }

  function isAllowed(row: Map<number, number>): boolean {
    return allowed(rowOf(row));
  }
}
