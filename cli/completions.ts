/** `wkv completions`: scripts for bash, zsh and fish, made from the option tables. */

import { type Command, defineCommand } from "./command.ts";
import { commands } from "./commands.ts";
import type { Option } from "./option.ts";
import { UsageError } from "./option.ts";

const shells = { bash, zsh, fish };

interface Entry {
  name: string;
  summary: string;
  command: Command;
}

/** The command. */
export const completionsCommand = defineCommand({
  operands: "bash|zsh|fish",
  most: { count: 1, what: "one shell" },
  choices: Object.keys(shells),
  description: `Prints a completion script. To use it:
  bash   source <(wkv completions bash)
  zsh    wkv completions zsh > "\${fpath[1]}/_wkv"
  fish   wkv completions fish > ~/.config/fish/completions/wkv.fish`,
  options: {},
  permissions: () => Promise.resolve([]),
  async run({ operands, terminal }) {
    const [shell = ""] = operands;
    if (!Object.hasOwn(shells, shell)) {
      throw new UsageError(
        `The shell must be one of ${Object.keys(shells).join(", ")}: found ${
          JSON.stringify(shell)
        }`,
      );
    }
    const entries = await Promise.all(
      Object.entries(commands).map(async ([name, { summary, load }]) => ({
        name,
        summary,
        command: await load(),
      })),
    );
    await terminal.out.write(shells[shell as keyof typeof shells](entries));
    return 0;
  },
});

/** Spellings of an option. */
function spellings(name: string, { short }: Option<unknown>): string[] {
  return short ? [`-${short}`, `--${name}`] : [`--${name}`];
}

function bash(entries: readonly Entry[]): string {
  const cases: string[] = [];
  for (const { name, command } of entries) {
    for (const [option, table] of Object.entries(command.options)) {
      if (table.value === null) continue;
      const pattern = spellings(option, table).map((spelling) =>
        `"${name} ${spelling}"`
      ).join("|");
      cases.push(
        `    ${pattern}) words="${table.choices?.join(" ") ?? ""}"; files=${
          table.file ? 1 : 0
        } ;;`,
      );
    }
    const all = Object.entries(command.options).flatMap(([option, table]) =>
      spellings(option, table)
    ).concat("--help", command.choices ?? []);
    cases.push(`    "${name} "*) words="${all.join(" ")}"; files=1 ;;`);
  }
  return `# wkv completion for bash
_wkv() {
  local cur prev words files
  cur="\${COMP_WORDS[COMP_CWORD]}"
  prev="\${COMP_WORDS[COMP_CWORD-1]}"
  if declare -F _get_comp_words_by_ref >/dev/null; then
    _get_comp_words_by_ref -n : cur prev
  fi
  files=0
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="${entries.map(({ name }) => name).join(" ")} --help --version"
  else
    case "\${COMP_WORDS[1]} $prev" in
${cases.join("\n")}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
  if [ "$files" -eq 1 ]; then
    COMPREPLY+=($(compgen -f -- "$cur"))
  fi
  if declare -F __ltrim_colon_completions >/dev/null; then
    __ltrim_colon_completions "$cur"
  fi
}
complete -o filenames -F _wkv wkv
`;
}

function zsh(entries: readonly Entry[]): string {
  const quote = (text: string): string => `'${text.replaceAll("'", "'\\''")}'`;
  const escape = (text: string): string => text.replace(/[\\[\]:]/g, "\\$&");
  const arguments_ = ({ command }: Entry): string => {
    const specs = Object.entries(command.options).flatMap(([option, table]) => {
      const value = table.value === null
        ? ""
        : `:${escape(table.value)}:${
          table.choices
            ? `(${table.choices.map(escape).join(" ")})`
            : table.file
            ? "_files"
            : " "
        }`;
      return spellings(option, table).map((spelling) =>
        quote(
          `${table.many ? "*" : ""}${spelling}[${
            escape(table.summary)
          }]${value}`,
        )
      );
    });
    specs.push(quote("--help[Show this help]"));
    specs.push(quote(
      command.choices
        ? `*::(${command.choices.join(" ")})`.replace("::", ": :")
        : "*: :_files",
    ));
    return specs.map((spec) => `        ${spec}`).join(" \\\n");
  };
  return `#compdef wkv
# wkv completion for zsh
_wkv() {
  if (( CURRENT == 2 )); then
    local -a names
    names=(
${
    entries.map(({ name, summary }) =>
      `      ${quote(`${name}:${escape(summary)}`)}`
    ).join("\n")
  }
    )
    _describe command names
    return
  fi
  local name="$words[2]"
  shift words
  (( CURRENT-- ))
  case "$name" in
${
    entries.map((entry) =>
      `    ${entry.name})\n      _arguments \\\n${arguments_(entry)} ;;`
    ).join("\n")
  }
  esac
}
if [ "$funcstack[1]" = "_wkv" ]; then _wkv "$@"; else compdef _wkv wkv; fi
`;
}

function fish(entries: readonly Entry[]): string {
  const quote = (text: string): string =>
    `'${text.replaceAll("\\", "\\\\").replaceAll("'", "\\'")}'`;
  const lines = ["# wkv completion for fish", "complete -c wkv -f"];
  for (const { name, summary, command } of entries) {
    lines.push(
      `complete -c wkv -n __fish_use_subcommand -a ${name} -d ${
        quote(summary)
      }`,
    );
    const when = `complete -c wkv -n '__fish_seen_subcommand_from ${name}'`;
    if (command.choices) {
      lines.push(`${when} -a ${quote(command.choices.join(" "))}`);
    }
    for (const [option, table] of Object.entries(command.options)) {
      const parts = [when, `-l ${option}`];
      if (table.short) parts.push(`-s ${table.short}`);
      if (table.value !== null) parts.push(table.file ? "-r -F" : "-x");
      if (table.choices) parts.push(`-a ${quote(table.choices.join(" "))}`);
      parts.push(`-d ${quote(table.summary)}`);
      lines.push(parts.join(" "));
    }
  }
  return lines.join("\n") + "\n";
}
