#!/usr/bin/env bash
# kitoken writes the bytes of a character backwards, if a SentencePiece Unigram model falls back to bytes for it.
#
# Seen with kitoken 0.11.1, sentencepiece 0.2.3 and Python 3.11. A character that the vocabulary lacks becomes one token
# for each of its UTF-8 bytes. SentencePiece gives them in the order of the text: C3 A9 for one such letter. kitoken
# gives A9 C3, and three bytes as last, middle, first; each character is turned round by itself, and all else is equal.
# The number of tokens is right, so lengths and tokens per byte do not tell it, but a model sees sequences that it was
# never trained on, and decoding gives bytes that are no UTF-8. A BPE model of the same text, with the same tokens for
# bytes, is right, and so is a character of one byte. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check kitoken==0.11.1 sentencepiece==0.2.3
cat > "$work/compare.py" <<'PYTHON'
import io

import kitoken
import sentencepiece

lines = [f"the quick brown fox jumps over the lazy dog {number}" for number in range(300)]
# By text: the bytes of what the vocabulary lacks, as SentencePiece has them, and as kitoken has them for Unigram.
texts = {
    "a \u00e9 b": ("C3 A9", "A9 C3"),
    "a \u8a9e b": ("E8 AA 9E", "9E AA E8"),
    "\u0416\u042f": ("D0 96 D0 AF", "96 D0 AF D0"),
    "a Z b": ("5A", "5A"),
    "the fox": ("", ""),
}
for kind in ("bpe", "unigram"):
    stored = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=stored, model_type=kind, vocab_size=330, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        hard_vocab_limit=False, minloglevel=2,
    )
    oracle = sentencepiece.SentencePieceProcessor(model_proto=stored.getvalue())
    other = kitoken.Kitoken.from_sentencepiece(stored.getvalue())
    for text, (right, turned) in texts.items():
        tokens = [oracle.encode(text), list(other.encode(text, True))]
        found = [" ".join(str(oracle.id_to_piece(t))[3:5] for t in own if oracle.is_byte(t)) for own in tokens]
        back = other.decode(tokens[1], True)
        print(f"{kind}: {text.encode()}: bytes by sentencepiece [{found[0]}], kitoken [{found[1]}], decoded {back}")
        wanted = [right, turned if kind == "unigram" else right]
        if found != wanted or sorted(tokens[0]) != sorted(tokens[1]):
            raise SystemExit(f"expected {wanted}, and the same tokens but for their order")
        if (tokens[0] == tokens[1], back == text.encode()) != (wanted[0] == wanted[1],) * 2:
            raise SystemExit("expected the text back where the order is right, and only there")
PYTHON
"$work/venv/bin/python" "$work/compare.py"
