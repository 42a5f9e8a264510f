/** Names of the files of a model in several GGUF files; used by the reader, by pulls and lists of models. */

const ENDING = /-(\d{5})-of-(\d{5})\.gguf$/;

/** How the name of one of several files ends; the first is part 1. */
export function partEnding(part: number, count: number): string {
  const digits = (n: number): string => String(n).padStart(5, "0");
  return `-${digits(part)}-of-${digits(count)}.gguf`;
}

/** Which part of how many a file's name or path says it is; null for any other. */
export function partOfName(
  name: string,
): { part: number; count: number } | null {
  const [, part, count] = ENDING.exec(name) ?? [];
  return part === undefined
    ? null
    : { part: Number(part), count: Number(count) };
}

/** The name or path of the first part, from that of one; the same where it is no part's. */
export function firstPart(name: string): string {
  const { count = 0 } = partOfName(name) ?? {};
  return count === 0 ? name : name.replace(ENDING, partEnding(1, count));
}

/** The names or paths of all parts, from that of one; it alone where it is no part's. */
export function partNames(name: string): string[] {
  const { count = 0 } = partOfName(name) ?? {};
  return count === 0 ? [name] : Array.from(
    { length: count },
    (_, i) => name.replace(ENDING, partEnding(i + 1, count)),
  );
}
