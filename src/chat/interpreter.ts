/** Runs chat templates within bounds: one that loops, recurses or multiplies its text ends with an error; used by template.ts. */

import { Environment, Interpreter, parse, tokenize } from "@huggingface/jinja";

/** A parsed template. */
export type Program = ReturnType<typeof parse>;
/** What a template works with: values have `type` and `value`. */
type Value = ReturnType<Interpreter["evaluate"]>;
type Statement = NonNullable<Parameters<Interpreter["evaluate"]>[0]>;
/** A node of a program; which members it has depends on its type. */
// deno-lint-ignore no-explicit-any -- the package does not export its nodes
type Node = Statement & Record<string, any>;

/** The most characters of a template; published ones have up to 30 thousand. */
const MOST_SOURCE = 256 * 1024;
/** The most blanks in a row: the parser takes their square in steps. */
const MOST_BLANKS = 1024;
/** The most characters of a text, written or in between. */
const MOST_TEXT = 8 * 1024 * 1024;
/** The most items of a range, as in Jinja's sandbox. */
const MOST_RANGE = 100_000;
/** The most characters handled in one rendering, all texts together. */
const MOST_WORK = 8 * MOST_TEXT;
/** What an item of a list counts for among them. */
const ITEM = 16;
/** Milliseconds of one rendering. */
const MOST_TIME = 1000;

/** A template that goes beyond a bound, or is wrong in itself. */
export class TemplateFault extends Error {
  /** Its name in messages. */
  override readonly name = "TemplateFault";
}

/** What `raise_exception` of a template was called with. */
export class TemplateRefusal extends Error {
  /** Its name in messages. */
  override readonly name = "TemplateRefusal";
}

/**
 * Parses a template with the settings of transformers: blocks take the blanks
 * before them and the newline behind them along.
 *
 * @throws {TemplateFault} It is no template, or too long.
 */
export function parseTemplate(source: string): Program {
  if (source.length > MOST_SOURCE) {
    throw new TemplateFault(
      `Found ${source.length} characters, expected at most ${MOST_SOURCE}`,
    );
  }
  if (new RegExp(`\\s{${MOST_BLANKS + 1}}`).test(source)) {
    throw new TemplateFault(
      `Found more than ${MOST_BLANKS} blanks in a row, expected fewer`,
    );
  }
  try {
    return parse(
      tokenize(source, { lstrip_blocks: true, trim_blocks: true }),
    );
  } catch (cause) {
    // Behind the last token the parser finds nothing, and takes it for one.
    const ends = cause instanceof TypeError;
    throw new TemplateFault(
      ends
        ? "It ends before all that it opens is closed, such as a loop"
        : reason(cause),
      { cause },
    );
  }
}

/**
 * Renders a template.
 *
 * @param variables What it may use beside Jinja's own: plain values, and
 * functions of plain values.
 * @throws {TemplateRefusal} It calls `raise_exception`.
 * @throws {TemplateFault} It fails, or goes beyond a bound.
 */
export function renderTemplate(
  program: Program,
  variables: Readonly<Record<string, unknown>>,
): string {
  const environment = new Environment();
  const all = { ...constants, ...variables };
  for (const [name, value] of Object.entries(all)) environment.set(name, value);
  try {
    const text = new BoundedInterpreter(environment, program).run(program);
    return text.value as string;
  } catch (cause) {
    if (cause instanceof TemplateRefusal || cause instanceof TemplateFault) {
      throw cause;
    }
    throw new TemplateFault(reason(cause), { cause });
  }
}

/** What every template has, as `range` without a bound would take the memory. */
const constants: Readonly<Record<string, unknown>> = {
  true: true,
  True: true,
  false: false,
  False: false,
  none: null,
  None: null,
  range,
  raise_exception(message: unknown) {
    throw new TemplateRefusal(String(message));
  },
};

function range(first: number, second?: number, step = 1): number[] {
  const [start, stop] = second === undefined ? [0, first] : [first, second];
  if (![start, stop, step].every(Number.isInteger) || step === 0) {
    throw new TemplateFault("range() takes whole numbers, and a step beside 0");
  }
  const length = Math.max(0, Math.ceil((stop - start) / step));
  if (length > MOST_RANGE) {
    throw new TemplateFault(
      `A range has ${length} items, expected at most ${MOST_RANGE}`,
    );
  }
  return Array.from({ length }, (_, i) => start + i * step);
}

/** The class of functions, which the package does not export. */
const FunctionValue = new Environment().set("f", () => null)
  .constructor as new (
    call: (args: Value[], scope: Environment) => Value,
  ) => Value;

/** A value in place of the node that gave it. */
function resolved(value: Value): Node {
  return { type: "Resolved", value } as unknown as Node;
}

/** Evaluates what a node works on before the node, so that its work is known beforehand. */
class BoundedInterpreter extends Interpreter {
  readonly #end = performance.now() + MOST_TIME;
  readonly #written: ReadonlySet<Node>;
  #work = 0;

  constructor(environment: Environment, program: Program) {
    super(environment);
    this.#written = writtenNodes(program);
  }

  override evaluate(
    node: Node | undefined,
    environment: Environment,
  ): Value {
    if (node?.type === "Resolved") return node.value;
    if (performance.now() > this.#end) {
      throw new TemplateFault(
        `It takes more than ${MOST_TIME / 1000} s, expected an end`,
      );
    }
    const value = this.#evaluate(node, environment);
    if (typeof value.value === "string") {
      if (value.value.length > MOST_TEXT) throw tooLong();
    } else if (node !== undefined && this.#written.has(node)) {
      this.#charge(this.#size(value));
    }
    return value;
  }

  #evaluate(node: Node | undefined, environment: Environment): Value {
    const known = (part: Node): Node =>
      resolved(this.evaluate(part, environment));
    switch (node?.type) {
      case "BinaryExpression": {
        const operator: string = node.operator.value;
        if (operator === "and" || operator === "or") break;
        const left = known(node.left);
        const right = known(node.right);
        // Texts put together are neither copied nor read.
        const joins = operator === "+" || operator === "~";
        for (const { value } of [left, right]) {
          if (!joins || typeof value.value !== "string") {
            this.#charge(this.#size(value));
          }
        }
        return super.evaluate({ ...node, left, right } as Node, environment);
      }
      case "TestExpression": {
        const operand = known(node.operand);
        this.#charge(this.#size(operand.value));
        return super.evaluate({ ...node, operand } as Node, environment);
      }
      case "MemberExpression":
        return this.#member(node, known, environment);
      case "FilterStatement": {
        const operand = known({ type: "Program", body: node.body } as Node);
        const { filter } = node;
        return this.#filter(operand, filter, known, environment);
      }
      case "FilterExpression": {
        const operand = known(node.operand);
        return this.#filter(operand, node.filter, known, environment);
      }
      case "ArrayLiteral":
      case "TupleLiteral":
      case "ObjectLiteral": {
        const value = super.evaluate(node, environment);
        this.#charge(this.#size(value));
        return value;
      }
    }
    return super.evaluate(node, environment);
  }

  /** A member, a slice, or a method: that is bounded when it is called. */
  #member(
    node: Node,
    known: (part: Node) => Node,
    environment: Environment,
  ): Value {
    const object = known(node.object);
    const { computed } = node;
    const slice = computed && node.property.type === "SliceExpression";
    if (slice) this.#charge(this.#size(object.value));
    const property = computed && !slice ? known(node.property) : node.property;
    if (typeof property.value?.value === "string") {
      this.#charge(property.value.value.length);
    }
    const member = { ...node, object, property } as Node;
    const found = super.evaluate(member, environment);
    const text = object.value.value;
    if (found.type !== "FunctionValue" || typeof text !== "string") {
      return found;
    }
    const name: string = computed ? property.value.value : property.value;
    const call = found.value as (args: Value[], scope: Environment) => Value;
    return new FunctionValue((args, scope) => {
      this.#apply(name, object.value, args);
      const [first] = args;
      return typeof first?.value === "string" && Object.hasOwn(strips, name)
        ? new Environment().set("text", strips[name]!(text, first.value))
        : call(args, scope);
    });
  }

  #filter(
    operand: Node,
    filter: Node,
    known: (part: Node) => Node,
    environment: Environment,
  ): Value {
    const args: Node[] = (filter.args ?? []).map((arg: Node) => {
      switch (arg.type) {
        // Some filters ask whether their arguments are literal.
        case "StringLiteral":
          return arg;
        case "KeywordArgumentExpression":
          return { ...arg, value: known(arg.value) };
        case "SpreadExpression":
        case "KeywordSpreadExpression":
          return { ...arg, argument: known(arg.argument) };
        default:
          return known(arg);
      }
    });
    const name: string = filter.callee?.value ?? filter.value;
    const values = args.map((arg): Value => {
      const inner = arg.argument ?? arg;
      return inner.type === "KeywordArgumentExpression"
        ? inner.value.value
        : inner.type === "StringLiteral"
        ? inner
        : inner.value;
    });
    this.#apply(name, operand.value, values);
    const own = filter.args === undefined ? filter : { ...filter, args };
    return super.evaluate(
      { type: "FilterExpression", operand, filter: own } as unknown as Node,
      environment,
    );
  }

  /** Counts the work of a filter or method; those that multiply, by what they give. */
  #apply(name: string, operand: Value, args: readonly Value[]): void {
    const all = args.flatMap((arg) =>
      arg.value instanceof Map ? [...arg.value.values() as Iterable<Value>] : [
        arg,
      ]
    );
    const size = this.#size(operand);
    const texts = all.map((arg) => this.#size(arg));
    const numbers = all.map(({ value }) =>
      typeof value === "number" ? Math.abs(value) : 0
    );
    const longest = Math.max(0, ...texts);
    const widest = Math.max(0, ...numbers);
    let result = size;
    if (name === "replace" || name === "join") result = size * (1 + longest);
    // Deeper levels of JSON are indented by more.
    if (name === "tojson") result = size * (2 + longest) * (1 + widest);
    if (name === "indent") result = size * (1 + widest);
    if (name === "split" || name === "list") result = size * ITEM;
    if (name === "replace" && typeof operand.value === "string") {
      const [old, to] = all;
      if (typeof old?.value === "string" && typeof to?.value === "string") {
        const most = old.value === ""
          ? size + 1
          : count(operand.value, old.value);
        result = size + most * to.value.length;
      }
    }
    if (result > MOST_WORK) throw tooLong();
    this.#charge(result + texts.reduce((sum, one) => sum + one, 0));
  }

  /** Characters of a value when it is written: what occurs twice counts twice. */
  #size(value: Value): number {
    let size = 0;
    const add = (one: Value): void => {
      const inner: unknown = one.value;
      size += typeof inner === "string" ? inner.length : 1;
      if (Array.isArray(inner) || inner instanceof Map) {
        for (const [key, item] of inner.entries()) {
          size += ITEM + (typeof key === "string" ? key.length : 0);
          add(item);
          if (size > MOST_WORK) throw tooLong();
        }
      }
    };
    add(value);
    return size;
  }

  #charge(work: number): void {
    this.#work += work;
    if (this.#work > MOST_WORK) throw tooLong();
  }
}

function tooLong(): TemplateFault {
  return new TemplateFault(
    `It makes more than ${MOST_TEXT} characters of text, or ${MOST_WORK} in between`,
  );
}

function count(text: string, part: string): number {
  let found = 0;
  for (let at = text.indexOf(part); at >= 0; found++) {
    at = text.indexOf(part, at + part.length);
  }
  return found;
}

/** Python's strips with characters to strip, which the package takes for none. */
const strips: Readonly<
  Record<string, (text: string, characters: string) => string>
> = {
  strip: (text, characters) => rstrip(lstrip(text, characters), characters),
  lstrip,
  rstrip,
};

function lstrip(text: string, characters: string): string {
  let from = 0;
  while (from < text.length && characters.includes(text[from]!)) from++;
  return text.slice(from);
}

function rstrip(text: string, characters: string): string {
  let to = text.length;
  while (to > 0 && characters.includes(text[to - 1]!)) to--;
  return text.slice(0, to);
}

/** Nodes whose values are written to the text, which spells lists and objects out. */
function writtenNodes(program: Program): Set<Node> {
  const written = new Set<Node>();
  const bodies = new Set(["body", "alternate", "defaultBlock"]);
  const queue: unknown[] = [program];
  for (let node = queue.pop(); node !== undefined; node = queue.pop()) {
    if (typeof node !== "object" || node === null) continue;
    if (node instanceof Map) queue.push(...node.keys(), ...node.values());
    for (const [name, part] of Object.entries(node)) {
      if (bodies.has(name) && Array.isArray(part)) {
        for (const one of part) written.add(one);
      }
      queue.push(part);
    }
  }
  return written;
}

/** What an error of the package says; running out of stack is one of them. */
function reason(error: unknown): string {
  const message = error instanceof Error ? error.message : String(error);
  return message.includes("call stack") ? "It nests too deeply" : message;
}
