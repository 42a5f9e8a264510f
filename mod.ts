/**
 * Generates text with a key/value cache of fixed size: WeightedKV
 * (arXiv 2503.01330) and the policies it is compared with.
 *
 * {@linkcode loadModel} opens a model, {@linkcode Model.createCache} makes a
 * cache with a policy and a budget, {@linkcode generate} continues a text
 * through it, {@linkcode perplexity} compares policies. Importing this module
 * does nothing else: the native library is opened, or built, by `loadModel`.
 *
 * @example Generate text
 * ```ts ignore
 * import { generate, loadModel } from "@weightedkv/weightedkv";
 *
 * using model = await loadModel("smollm2-135m-instruct");
 * using cache = model.createCache({ policy: "weighted-kv", budget: 256 });
 * for await (const { text } of generate(model, "Once upon a time", { cache })) {
 *   console.log(text);
 * }
 * ```
 *
 * @module
 */

export { loadModel, type LoadOptions, type Model } from "./src/model.ts";
export {
  type CacheReport,
  type CacheSettings,
  type FinishReason,
  generate,
  type GenerateOptions,
  type GenerateResult,
  type Piece,
  type TokenEvent,
} from "./src/generate.ts";
export {
  Chat,
  type ChatOptions,
  type ChatResult,
  createChat,
  type SendOptions,
} from "./src/chat.ts";
export type { ChatMessage } from "./src/chat/template.ts";
export type { ChatTemplates, TemplateSource } from "./src/chat/sources.ts";
export {
  perplexity,
  type PerplexityOptions,
  type PerplexityRow,
  type WindowResult,
} from "./src/evaluate/perplexity.ts";
export {
  evaluate,
  type EvaluateOptions,
  type EvaluateRow,
  type PromptRegime,
  type QuestionResult,
  tasks,
} from "./src/evaluate/evaluate.ts";
export type { Question, Task } from "./src/evaluate/tasks/task.ts";
export { Random } from "./src/evaluate/tasks/random.ts";
export type { ResultStore } from "./src/evaluate/results.ts";
export {
  compare,
  type ComparedText,
  type CompareOptions,
  type Comparison,
} from "./src/evaluate/compare.ts";
export { type Prefill, type SamplerOptions, Session } from "./src/session.ts";
export {
  type CacheEvent,
  type CacheRows,
  type CacheStats,
  type KvCache,
} from "./src/cache/cache.ts";
export type {
  CacheOptions,
  CacheShape,
  CacheType,
  Positions,
} from "./src/cache/layout.ts";
export {
  budgetPresets,
  type BudgetSize,
  type LayerBudgets,
} from "./src/cache/budget.ts";
export {
  type Budget,
  type Merge,
  type Policy,
  resolveBudget,
  type Select,
} from "./src/cache/policy.ts";
export { findPolicy, policies, policyNames } from "./src/cache/registry.ts";
export {
  DEFAULT_MODEL,
  describeModel,
  type ListedModel,
  listModels,
  type ModelDetails,
  type ModelOptions,
  type Progress,
  type ProgressFile,
  pullModel,
  removeModel,
  resolveModel,
} from "./src/hub/models.ts";
export {
  type EncodeOptions,
  TextStream,
  type TextStreamOptions,
  type Tokenizer,
} from "./src/tokenizer/tokenizer.ts";
export type {
  Activations,
  ModelConfig,
  Network,
  Pass,
  SlidingWindow,
} from "./src/models/architecture.ts";
export type { Rope } from "./src/models/rope.ts";
export type {
  Backend,
  BackendOptions,
  Device,
  Graph,
} from "./src/backend/backend.ts";
export type { FindOptions } from "./src/backend/library.ts";
export type { KernelUse } from "./src/backend/build.ts";
export type { Activation, Precision } from "./src/backend/ops.ts";
export type { Dtype, Tensor } from "./src/backend/tensor.ts";
export { LibraryError, WkvError } from "./src/backend/error.ts";
export { FormatError } from "./src/formats/error.ts";
