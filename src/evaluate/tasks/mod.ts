/** The tasks, one line a file. */

export { passkey } from "./passkey.ts";
export { niahSingle1 } from "./niah_single_1.ts";
export { niahMultikey2 } from "./niah_multikey_2.ts";
export { niahMultikey3 } from "./niah_multikey_3.ts";
export { variableTracking } from "./variable_tracking.ts";
export { commonWords } from "./common_words.ts";
export { frequentWords } from "./frequent_words.ts";
export { keyValue } from "./key_value.ts";
