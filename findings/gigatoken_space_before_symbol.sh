#!/usr/bin/env bash
# gigatoken loses the space before a user-defined symbol, if the SentencePiece model removes extra white space.
#
# Seen with gigatoken 0.10.0 and sentencepiece 0.2.1 (Python 3.11), on a BPE model with SentencePiece's own defaults
# (remove_extra_whitespaces, nmt_nfkc) but no dummy prefix, and one user-defined symbol. In "the <up>fox" the space is
# inside the text, so SentencePiece keeps it as a piece of its own, and decoding gives the text back. gigatoken treats
# what stands before the symbol as a text that ends there, whose last space is removed: one token fewer, and other text
# when decoded. With remove_extra_whitespaces=False both agree. Tokenizers that mark capital letters with symbols have a
# symbol behind every second space, so nearly every document is affected. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check gigatoken==0.10.0 sentencepiece==0.2.1
cat > "$work/compare.py" <<'PYTHON'
import sys

import gigatoken
import sentencepiece

lines = [f"the quick brown fox jumps over the lazy dog {number}" for number in range(300)]
expected = {True: ["'the', '▁', '<up>', 'fox'", "'the', '<up>', 'fox'"], False: ["'the', '▁', '<up>', 'fox'"] * 2}
for removes, wanted in expected.items():
    prefix = f"{sys.argv[1]}/{removes}"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=prefix, model_type="bpe", vocab_size=330, byte_fallback=True,
        user_defined_symbols=["<up>"], add_dummy_prefix=False, remove_extra_whitespaces=removes, minloglevel=2,
    )
    oracle = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    other = gigatoken.Tokenizer.from_sentencepiece(f"{prefix}.model")
    tokens = [oracle.encode("the <up>fox"), [int(token) for token in other.encode("the <up>fox")]]
    pieces = [str(oracle.id_to_piece(own))[1:-1] for own in tokens]
    texts = [oracle.decode(own) for own in tokens]
    print(f"remove_extra_whitespaces={removes}: sentencepiece {pieces[0]}; gigatoken {pieces[1]}; decoded {texts}")
    if pieces != wanted or texts != ["the <up>fox", "the<up>fox" if removes else "the <up>fox"]:
        raise SystemExit(f"expected {wanted}")
PYTHON
"$work/venv/bin/python" "$work/compare.py" "$work"
