/** Random: numbers and words that a seed and a label repeat; used by the tasks. */

const ADJECTIVES =
  "amber ancient bitter bold brave brisk broken calm careful cheerful clever coarse cold cosy crooked curious damp dark deep dim distant dry dusty early eager empty faint famous fancy fierce flat fragile frozen gentle giant golden grand green grim happy hasty hollow honest humble icy idle jolly keen large lazy light little lively lonely loud lucky mellow merry mighty misty modest narrow neat noble odd old pale patient plain polite proud quick quiet rapid rare rich ripe rough round rusty salty sharp shiny shy silent silver simple sleepy slow small smooth soft solid sour steady steep stiff strange strong sturdy sweet swift tall tame tender thin tidy tiny tired tough vast vivid warm weary wild wise witty young"
    .split(" ");
const NOUNS =
  "acorn anchor apple apron arrow badger barley barn basket beacon bell blanket boat bottle branch bread bridge brook broom bucket button cabin camel candle canyon carpet castle cellar chair cherry chimney clock cloud coach coat copper cottage cradle crow curtain daisy desert dragon drum eagle engine falcon feather fence ferry field flute forest fountain fox garden garnet gate glacier glove goat grape hammer harbor harvest hat hedge hill horse island ivy jacket jar kettle key kitchen ladder lake lamp lantern lemon letter lion lizard magnet maple market meadow mill mirror mountain museum needle nest oak ocean orchard otter oven paddle palace pebble pencil piano pigeon pillow pine planet plum pocket pond potato quarry rabbit raft river rocket rope saddle sailor sandal school shadow shelf ship shovel spider spoon statue stone storm sugar table tent thimble thunder ticket tiger tower train tulip tunnel turtle valley violin wagon walnut well whale wheel whistle willow window winter wolf"
    .split(" ");

/** Uniform numbers from a seed and a label (FNV-1a, then mulberry32). */
export class Random {
  #state: number;

  /** Another label gives other numbers. */
  constructor(seed: number, label: string) {
    let hash = 0x811c9dc5;
    for (const byte of new TextEncoder().encode(`${seed} ${label}`)) {
      hash = Math.imul(hash ^ byte, 0x01000193);
    }
    this.#state = hash;
  }

  /** A whole number below `count`. */
  below(count: number): number {
    this.#state = (this.#state + 0x6d2b79f5) | 0;
    let x = Math.imul(this.#state ^ (this.#state >>> 15), this.#state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return Math.floor(((x ^ (x >>> 14)) >>> 0) / 2 ** 32 * count);
  }

  /** A number of this many digits, the first not 0. */
  digits(count: number): string {
    const least = 10 ** (count - 1);
    return String(least + this.below(9 * least));
  }

  /** Letters from `a` on, or from `A` on. */
  letters(count: number, first: "a" | "A"): string {
    const from = first.charCodeAt(0);
    return String.fromCharCode(
      ...Array.from({ length: count }, () => from + this.below(26)),
    );
  }

  /** A version 4 UUID. */
  uuid(): string {
    const hex = (count: number) =>
      Array.from({ length: count }, () => this.below(16).toString(16)).join("");
    const variant = "89ab"[this.below(4)]!;
    return `${hex(8)}-${hex(4)}-4${hex(3)}-${variant}${hex(3)}-${hex(12)}`;
  }

  /** An adjective and a noun. */
  pair(): string {
    const adjective = ADJECTIVES[this.below(ADJECTIVES.length)]!;
    return `${adjective}-${NOUNS[this.below(NOUNS.length)]!}`;
  }

  /** Adjectives and nouns in random order, each once. */
  words(): string[] {
    return this.shuffled([...ADJECTIVES, ...NOUNS]);
  }

  /** The same in another order. */
  shuffled<T>(list: readonly T[]): T[] {
    const out = [...list];
    for (let i = out.length - 1; i > 0; i--) {
      const j = this.below(i + 1);
      [out[i], out[j]] = [out[j]!, out[i]!];
    }
    return out;
  }

  /**
   * Different values of a kind, none of them in `not`.
   *
   * @throws {RangeError} There seem to be no more.
   */
  distinct(
    count: number,
    draw: () => string,
    not: ReadonlySet<string> = new Set(),
  ): string[] {
    const found = new Set<string>();
    for (let tries = 0; found.size < count; tries++) {
      if (tries > 100 * count) {
        throw new RangeError(
          `The length needs ${count} different keys: only ${found.size} were found, ask for a shorter one`,
        );
      }
      const value = draw();
      if (!not.has(value)) found.add(value);
    }
    return [...found];
  }
}
