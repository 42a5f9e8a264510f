/** showUsage(): answers --help in the scripts of this folder, which begin with what they take. */

/** Prints the head comment of a script and ends it, where `--help` asks for it. */
export async function showUsage(script: string): Promise<void> {
  if (!Deno.args.some((arg) => arg === "--help" || arg === "-h")) return;
  const source = await (await fetch(script)).text();
  const [, head] = /^\/\*\*\n(.+?)\n \*\/\n/s.exec(source)!;
  console.log(head!.replaceAll(/^ \* ?/gm, ""));
  Deno.exit();
}
