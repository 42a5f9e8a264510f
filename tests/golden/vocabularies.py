"""Writes vocabularies/*.json: small vocabularies trained here, and the ids that PyPI tokenizers, transformers and sentencepiece give the lines of tokenizer_corpus.json with them.

Run from the project's root:
  python3 -m venv VENV && VENV/bin/pip install tokenizers==0.23.2 transformers==5.23.0 sentencepiece==0.2.3
  VENV/bin/python tests/golden/vocabularies.py
Vocabularies are trained without splitting text into words, so that a split in the wrong place shows.
"""

import json
import os
import tempfile
from collections import Counter

import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = "tests/golden"
OUT = f"{FOLDER}/vocabularies"
LINES = json.load(open(f"{FOLDER}/tokenizer_corpus.json"))
TEXT = open(f"{FOLDER}/text.txt").read()
# Line breaks and digits are rare in the text: these make merges of them.
MORE = [
    "\n\n", "\n\n\n", " \n", ".\n", "!\n", "\r\n", "/\n", "  ", "    ", "\t\t", "\t", " \t",
    *(str(n) for n in range(10, 100)), *(f"{n:03d}" for n in range(0, 1000, 37)),
    "'s 't 're 've 'm 'll 'd", "n't 'S 'T 'RE 'LL", " a 1", "a1", "1a", ". The", ", and",
]


def training(text):
    """Lines of the text and of the corpus, the latter often enough to count; none with a special token, which no merge may make."""
    yield from text.split("\n")
    for _ in range(4):
        yield from (line for line in LINES if "<" not in line)
        yield from MORE


def write(name, value):
    rows = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in value.items())
    with open(f"{OUT}/{name}.json", "w") as file:
        file.write("{\n" + rows + "\n}\n")


def train(model, normalizer, pre_tokenizer, **options):
    tokenizer = Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(max_token_length=12, show_progress=False, **options)
    tokenizer.train_from_iterator(training(TEXT), trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(trained["vocab"], key=trained["vocab"].get)
    return {"tokens": tokens, "merges": [" ".join(pair) for pair in trained["merges"]]}


def train_bytes():
    return train(
        models.BPE(), None, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


def train_text():
    counts = Counter("".join(training(TEXT)).replace(" ", "\u2581"))
    alphabet = sorted(counts, key=lambda character: (-counts[character], character))[:200]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return train(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        normalizers.Replace(" ", "\u2581"), None,
        vocab_size=1300, initial_alphabet=alphabet, limit_alphabet=len(alphabet), special_tokens=special,
    )


def train_scores(kind, size):
    """A vocabulary of SentencePiece: its BPE is for llama.cpp (vocabularies.mjs)."""
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training(TEXT), model_prefix=f"{folder}/m", model_type=kind, vocab_size=size,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            split_by_whitespace=False, split_digits=False, split_by_unicode_script=False, split_by_number=False,
            character_coverage=0.98, max_sentencepiece_length=12, user_defined_symbols=["<tool>"],
            num_threads=1, minloglevel=2,
        )
        model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/m.model")
    ids = range(model.get_piece_size())
    type = lambda id: 2 if model.is_unknown(id) else 3 if model.is_control(id) else 6 if model.is_byte(id) else 4 if id == 3 else 1
    return {"tokens": [model.id_to_piece(id) for id in ids], "scores": [round(model.get_score(id), 4) for id in ids], "types": [type(id) for id in ids]}


def byte_level(regex=False, prefix=False):
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex}


def split(regex, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def splits(*regexes):
    return sequence(*map(split, regexes), byte_level())


def added(content, special=True, **flags):
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": not special, "special": special, **flags}


CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+END|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*END"
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
QWEN2 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
DEEPSEEK = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|""" + SPACES
CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
END = added("<|endoftext|>")
CHAT = [END, added("<|im_start|>"), added("<|im_end|>")]
NFC = {"type": "NFC"}
DIGITS = {"type": "Digits", "individual_digits": True}

# name: pre_tokenizer, normalizer, added tokens, flags of the model
BYTES = {
    "gpt2": (byte_level(True), None, [END], {}),
    "roberta": (byte_level(True, True), None, [END], {}),
    "neox": (byte_level(True), NFC, [
        END, added("  ", False), added("   ", False), added("user", False, single_word=True),
        added("<tool>", True, lstrip=True), added("[x]", True, lstrip=True, rstrip=True), added("u\u0308ber fu\u0308r", False),
    ], {}),
    "llama3": (splits(LLAMA3), None, [added("<|begin_of_text|>"), added("<|eot_id|>"), END], {"ignore_merges": True}),
    "qwen2": (splits(QWEN2), NFC, CHAT, {}),
    "qwen3.5": (splits(ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES), NFC, CHAT, {}),
    "gpt-4o": (splits(CASED.replace("END", ENDINGS + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES), None, CHAT, {}),
    "tekken": (splits(CASED.replace("END", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES), None, [added("<s>"), added("</s>"), added("[INST]")], {"ignore_merges": True}),
    "cl100k": (sequence(split(r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+", "Removed", True), byte_level()), None, CHAT, {}),
    "deepseek-v3": (splits(r"\p{N}{1,3}", CJK, DEEPSEEK), None, [], {}),
    "deepseek-coder": (sequence(split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"), DIGITS, byte_level()), None, [], {}),
    "falcon": (sequence({"type": "Punctuation", "behavior": "Contiguous"}, byte_level(True), {"type": "Digits", "individual_digits": False}, split("[0-9][0-9][0-9]")), None, [added(">>ABSTRACT<<"), END], {}),
    "bloom": (splits(" ?[^(\\s|[.,!?…。，、।۔،])]+"), None, [], {}),
    "starcoder": (sequence(DIGITS, byte_level(True)), None, [END], {}),
    "command": (sequence(split(r"\d{1,3}(?=(?:\d{3})*\b)"), split(CASED.replace("END", ENDINGS + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES), byte_level()), NFC, [], {}),
    "exaone": (splits(ENDINGS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"), None, [], {}),
    "lines": (splits("[^\n]+|[\n]+", QWEN2), None, [], {}),
    "seed": (splits(ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"), None, [], {}),
}


def metaspace(scheme, words):
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": words}


BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, BLANKS]}
S = [added("<unk>"), added("<s>"), added("</s>")]
UNDO = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Sequence", "decoders": [*UNDO, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
KEEP = {"type": "Sequence", "decoders": UNDO}

# name: pre_tokenizer, normalizer, added tokens, decoder, flags of the model
UNIGRAMS = {
    "unigram": (metaspace("always", True), {"type": "NFKC"}, S, metaspace("always", True), {"byte_fallback": False}),
    "unigram-bytes": (metaspace("first", False), None, S, STRIP, {"byte_fallback": True}),
}

# name: pre_tokenizer, normalizer, added tokens, decoder
TEXTS = {
    "llama": (None, PREPEND, S, STRIP),
    "llama-first": (metaspace("first", False), None, S, STRIP),
    "phi3": (None, PREPEND, [*S[:2], added("</s>", True, rstrip=True), added("[INST]", True, rstrip=True)], STRIP),
    "gemma": ({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}, BLANKS,
              [*S, added("\n\n", False, normalized=False), added("\u2581\u2581", False, normalized=False)], KEEP),
    "words": (metaspace("always", True), {"type": "NFKC"}, S, {**metaspace("always", True)}),
    "never": (metaspace("never", True), None, [*S, added("user", False)], KEEP),
}


def compose(vocabulary, pre_tokenizer, normalizer, tokens, model, decoder):
    """A tokenizer.json; the test puts the same together."""
    ids = {token: id for id, token in enumerate(vocabulary["tokens"])}
    listed = []
    for token in tokens:
        listed.append({"id": ids.setdefault(token["content"], len(ids)), **token})
    in_model = {token: ids[token] for token in vocabulary["tokens"]}
    if "scores" in vocabulary:
        of_model = {"type": "Unigram", "unk_id": 0, **model, "vocab": [*zip(vocabulary["tokens"], vocabulary["scores"])]}
    else:
        of_model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                    "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                    **model, "vocab": in_model, "merges": vocabulary["merges"]}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": sorted(listed, key=lambda token: token["id"]),
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder,
        "model": of_model,
    }


def run(parts, first):
    """What a tokenizer gives the lines: null where it is what `first` gives."""
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    special = [tokenizer.encode(line, add_special_tokens=False).ids for line in LINES]
    tokenizer.encode_special_tokens = True
    plain = [tokenizer.encode(line, add_special_tokens=False).ids for line in LINES]
    decoded = [tokenizer.decode(ids, skip_special_tokens=False) for ids in plain]
    return {
        "ids": [None if first and ids == first["ids"][i] else ids for i, ids in enumerate(plain)],
        "special": {i: ids for i, ids in enumerate(special) if ids != plain[i]},
        "decoded": {i: text for i, text in enumerate(decoded) if text != LINES[i]},
    }


def golden(vocabulary, cases):
    written = {}
    first = None
    for name, parts in cases.items():
        result = run(compose(vocabulary, **parts), first)
        first = first or result
        written[name] = {**parts, **result}
    return written


CONFIGS = {
    "nothing": ({}, False),
    "names": ({"bos_token": "<s>", "eos_token": "</s>"}, False),
    "objects": ({"bos_token": {"__type": "AddedToken", "content": "<s>", "special": True}, "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}}, False),
    "template": ({"bos_token": "<s>", "eos_token": "</s>"}, True),
    "refused": ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}, True),
    "template without names": ({}, True),
}


def configs(vocabulary):
    """What transformers makes of a tokenizer_config.json, with and without a template that puts <s> first."""
    written = {}
    for name, (config, template) in CONFIGS.items():
        pre_tokenizer, normalizer, tokens, decoder = TEXTS["llama"]
        parts = compose(vocabulary, pre_tokenizer, normalizer, tokens, TEXT_MODEL, decoder)
        if template:
            parts["post_processor"] = TEMPLATE
        with tempfile.TemporaryDirectory() as folder:
            json.dump(parts, open(f"{folder}/tokenizer.json", "w"))
            json.dump({"tokenizer_class": "PreTrainedTokenizerFast", **config}, open(f"{folder}/tokenizer_config.json", "w"))
            loaded = PreTrainedTokenizerFast.from_pretrained(folder)
        ids = loaded("a").input_ids
        written[name] = {
            "config": config, "post_processor": parts["post_processor"],
            "bos": loaded.bos_token_id, "eos": loaded.eos_token_id, "addBos": ids[0] == 1,
        }
    return written


TEXT_MODEL = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}

if __name__ == "__main__":
    os.makedirs(OUT, exist_ok=True)
    by_bytes, by_text = train_bytes(), train_text()
    write("bytes", by_bytes)
    write("text", by_text)
    write("scores", train_scores("bpe", 1300))
    by_unigram = train_scores("unigram", 1000)
    write("unigram", by_unigram)
    names = ["pre_tokenizer", "normalizer", "tokens"]
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    write("bytes_ids", golden(by_bytes, {
        name: {**dict(zip(names, parts)), "model": parts[3], "decoder": decoder} for name, parts in BYTES.items()
    }))
    write("text_ids", golden(by_text, {
        name: {**dict(zip(names, parts)), "model": TEXT_MODEL, "decoder": parts[3]} for name, parts in TEXTS.items()
    }))
    write("unigram_ids", golden(by_unigram, {
        name: {**dict(zip(names, parts)), "decoder": parts[3], "model": parts[4]} for name, parts in UNIGRAMS.items()
    }))
    write("configs", configs(by_text))
