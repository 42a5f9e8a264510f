/** Every command's name; main.ts and completions.ts load them from here, each when it is needed. */

import type { Command } from "./command.ts";

/** One row of the list. */
export interface CommandEntry {
  /** One line of the main help. */
  summary: string;
  /** Loads it. */
  load: () => Promise<Command>;
}

/** Commands by name, in the order of the main help. */
export const commands: Readonly<Record<string, CommandEntry>> = {
  generate: {
    summary: "Continue a text with a cache of fixed size",
    load: async () => (await import("./generate.ts")).generateCommand,
  },
  chat: {
    summary: "Talk with a model through its chat template",
    load: async () => (await import("./chat.ts")).chatCommand,
  },
  perplexity: {
    summary: "Measure policies and budgets on a text",
    load: async () => (await import("./perplexity.ts")).perplexityCommand,
  },
  eval: {
    summary: "Ask questions whose answers lie far back",
    load: async () => (await import("./eval.ts")).evalCommand,
  },
  compare: {
    summary: "Continue one prompt under several policies, side by side",
    load: async () => (await import("./compare.ts")).compareCommand,
  },
  verify: {
    summary: "Repeat a run that was kept, and compare",
    load: async () => (await import("./verify.ts")).verifyCommand,
  },
  bench: {
    summary: "Time kernels, or a model's decode steps",
    load: async () => (await import("./bench.ts")).benchCommand,
  },
  pull: {
    summary: "Download a model, or verify one that is here",
    load: async () => (await import("./pull.ts")).pullCommand,
  },
  list: {
    summary: "List the models that are here",
    load: async () => (await import("./list.ts")).listCommand,
  },
  show: {
    summary: "Show where a model's files are, and of which revision",
    load: async () => (await import("./show.ts")).showCommand,
  },
  rm: {
    summary: "Remove a model",
    load: async () => (await import("./rm.ts")).rmCommand,
  },
  info: {
    summary: "Show what a model file holds and what its cache takes",
    load: async () => (await import("./info.ts")).infoCommand,
  },
  plan: {
    summary: "Say which budget or batch fits a memory size",
    load: async () => (await import("./plan.ts")).planCommand,
  },
  build: {
    summary: "Compile the native library anew",
    load: async () => (await import("./build.ts")).buildCommand,
  },
  doctor: {
    summary: "Check what generating needs on this machine",
    load: async () => (await import("./doctor.ts")).doctorCommand,
  },
  completions: {
    summary: "Print a completion script for bash, zsh or fish",
    load: async () => (await import("./completions.ts")).completionsCommand,
  },
};
