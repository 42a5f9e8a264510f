/** What the commands use of `@std/cli/parse-args`. */
export declare function parseArgs(
  args: string[],
  options?: {
    "--"?: boolean;
    alias?: Record<string, string>;
    boolean?: readonly string[];
    string?: readonly string[];
    collect?: readonly string[];
    default?: Record<string, unknown>;
    stopEarly?: boolean;
    unknown?: (arg: string, key?: string, value?: unknown) => unknown;
  },
): { _: (string | number)[]; "--"?: string[]; [name: string]: unknown };
