/**
 * Writes what the TypeScript side takes from kernels/: the symbol table (from
 * wkv.h) and the sources that a package carries. Run by `deno task bind`.
 */

const header = new URL("./wkv.h", import.meta.url);
const backend = new URL("../src/backend/", import.meta.url);

const types: Record<string, string> = {
  int32_t: "i32",
  float: "f32",
  void: "void",
};

/** The symbol table of a header, as the text of src/backend/symbols.ts. */
export function symbolTable(text: string): string {
  const lines: string[] = [];
  const declaration = /^(WKV_API|WKV_API_SLOW) (\w+) (\w+)\(([^)]*)\);/gm;
  const bare = text.replace(
    /\/\*[\s\S]*?\*\//g,
    (comment) => comment.includes("\n") ? "\n" : "",
  );
  for (const [, macro, result, name, list] of bare.matchAll(declaration)) {
    const parameters = list === "void" ? [] : list!.split(",").map((p) => {
      const type = p.trim().replace(/\s*\w+\s*$/, "").replace("const ", "");
      return type.endsWith("*") ? "buffer" : native(type);
    });
    lines.push(
      `  ${name}: { parameters: ${JSON.stringify(parameters)}, result: "${
        native(result!)
      }"${macro === "WKV_API_SLOW" ? ", nonblocking: true" : ""} },`,
    );
  }
  return [
    "/** The C ABI as Deno.dlopen wants it, and its constants. Made from kernels/wkv.h by `deno task bind`. */",
    "",
    `export const ABI_VERSION = ${/WKV_ABI_VERSION (\d+)/.exec(text)![1]};`,
    "",
    ...constants(bare),
    "export const symbols = {",
    ...lines,
    "} as const satisfies Deno.ForeignLibraryInterface;",
    "",
  ].join("\n");
}

/** Each enum as an object of its values. */
function constants(text: string): string[] {
  return [...text.matchAll(/enum (\w+) \{([^}]*)\}/g)].flatMap((
    [, name, body],
  ) => [
    `export const ${name} = {`,
    ...[...body!.matchAll(/(\w+) = (\d+)/g)].map(([, key, value]) =>
      `  ${key}: ${value},`
    ),
    "} as const;",
    "",
  ]);
}

function native(type: string): string {
  const found = types[type];
  if (found === undefined) {
    throw new SyntaxError(`wkv.h uses a type that has no binding: ${type}`);
  }
  return found;
}

/** The names of the files that a build needs, sorted. */
export async function sourceNames(): Promise<string[]> {
  const names: string[] = [];
  for (const folder of ["", "cpu/", "cuda/"]) {
    for await (
      const entry of Deno.readDir(new URL(`./${folder}`, import.meta.url))
    ) {
      if (/\.(h|hpp|cpp|cuh|cu)$/.test(entry.name)) {
        names.push(folder + entry.name);
      }
    }
  }
  return names.sort();
}

/** The text of src/backend/sources.ts. */
export async function sourceModule(): Promise<string> {
  const lines = [
    "/** The sources of the native libraries, by path below kernels/. Made by `deno task bind`. */",
    "export const sources: Record<string, string> = {",
  ];
  for (const name of await sourceNames()) {
    const text = await Deno.readTextFile(new URL(name, import.meta.url));
    const escaped = text.replaceAll("\\", "\\\\").replaceAll("`", "\\`")
      .replaceAll("${", "\\${");
    lines.push(`  ${JSON.stringify(name)}: \`${escaped}\`,`);
  }
  lines.push("};", "");
  return lines.join("\n");
}

if (import.meta.main) {
  await Deno.writeTextFile(
    new URL("symbols.ts", backend),
    symbolTable(await Deno.readTextFile(header)),
  );
  await Deno.writeTextFile(
    new URL("sources.ts", backend),
    await sourceModule(),
  );
}
