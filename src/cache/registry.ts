/** Policies by name; the command line and createCache look them up here. */

import * as all from "./policies/mod.ts";
import type { Policy } from "./policy.ts";

/** Every policy, by name. */
export const policies: ReadonlyMap<string, Policy> = new Map(
  Object.values(all).map((policy): [string, Policy] => [policy.name, policy]),
);

/** Every name that {@linkcode findPolicy} takes, options included. */
export function policyNames(): string[] {
  return [...policies.values()].flatMap(({ name, options }) => [
    name,
    ...Object.keys(options ?? {}).map((option) => `${name}:${option}`),
  ]);
}

/**
 * The policy of a name such as `weighted-kv-ward:linear`.
 *
 * @throws {RangeError} There is none; the error lists the names there are.
 */
export function findPolicy(name: string): Policy {
  const [, base, option] = /^([^:]*)(?::(.*))?$/s.exec(name)!;
  const policy = policies.get(base!);
  const variant = option === undefined
    ? {}
    : Object.hasOwn(policy?.options ?? {}, option)
    ? policy?.options?.[option]
    : undefined;
  if (policy === undefined || variant === undefined) {
    throw new RangeError(
      `Unknown policy "${name}": known are ${policyNames().join(", ")}`,
    );
  }
  return { ...policy, ...variant, name };
}
