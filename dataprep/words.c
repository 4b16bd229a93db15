/* What data preparation does to every byte of its texts; `words.py` compiles, loads and explains it.

Texts lie in one buffer, 0xFF before each and behind the last: no UTF-8 holds that byte, so that it ends every
loop. All functions write into buffers of the caller, who knows how much they can need. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint64_t u64;

static const u64 FACTOR = 0x9E3779B97F4A7C15;

enum { LONGEST = 256 };  /* characters of a word that is merged here: the time grows with their square */
enum { LONGEST_KNOWN = 23, AHEAD = 32 };  /* bytes of a word that is remembered; words looked up at once */
enum { TITLE = 0x81, ALLCAPS, CAPNEXT, ESC };  /* operators are 0xEE 0x80 and one of these */

static int is_upper(u8 byte) { return (u8)(byte - 'A') < 26; }
static int is_letter(u8 byte) { return (u8)((byte | 32) - 'a') < 26; }
static int is_printable(u8 byte) { return byte > ' ' && byte < 0x7F; }
static int is_operator(const u8 *at) { return at[0] == 0xEE && at[1] == 0x80 && at[2] >= TITLE && at[2] <= ESC; }

static u8 *put_operator(u8 *out, u8 operator) {
    *out++ = 0xEE, *out++ = 0x80, *out++ = operator;
    return out;
}

/* CaseOps of texts, as `lossless_caps.encode_utf8`: at most four times their bytes. Returns how many. */
int64_t caps(const u8 *in, int64_t size, u8 *out) {
    const u8 *end = in + size;
    u8 *first = out;
    while (in < end) {
        int64_t run = 0;  /* of capitals */
        if (*in == 0xEE) {
            if (is_operator(in)) out = put_operator(out, ESC);
        } else if (is_upper(*in)) {
            if (is_letter(in[-1])) {  /* there is one: texts begin behind 0xFF */
                out = put_operator(out, CAPNEXT);
            } else {
                while (is_upper(in[run])) run++;
                int whole = run > 1 && !is_letter(in[run]);
                out = put_operator(out, whole ? ALLCAPS : TITLE);
                while (whole && run-- > 1) *out++ = *in++ | 32;
            }
            *out++ = *in++ | 32;
            continue;
        }
        *out++ = *in++;
    }
    return out - first;
}

/* UTF-8 without white space, as `str.split` sees it. Returns how many bytes. */
int64_t bare(const u8 *in, int64_t size, u8 *out) {
    static const u8 ascii_space[256] = {[9] = 1, 1, 1, 1, 1, [28] = 1, 1, 1, 1, 1};
    const u8 *end = in + size;
    u8 *first = out;
    while (in < end) {
        int spaces = 0;
        if (*in < 0xC2 || *in > 0xE3) {  /* nearly all; a branch at each space would be guessed wrong */
            *out = *in;
            out += !ascii_space[*in++];
            continue;
        } else if (*in == 0xC2) {  /* U+0085, U+00A0 */
            spaces = 2 * (in[1] == 0x85 || in[1] == 0xA0);
        } else if (*in == 0xE1) {  /* U+1680 */
            spaces = 3 * (in[1] == 0x9A && in[2] == 0x80);
        } else if (*in == 0xE2 && in[1] == 0x80) {  /* U+2000 to U+200A, U+2028, U+2029, U+202F */
            spaces = 3 * (in[2] <= 0x8A || in[2] == 0xA8 || in[2] == 0xA9 || in[2] == 0xAF);
        } else if (*in == 0xE2 || *in == 0xE3) {  /* U+205F, U+3000 */
            spaces = 3 * (in[1] == (*in == 0xE2 ? 0x81 : 0x80) && in[2] == (*in == 0xE2 ? 0x9F : 0x80));
        }
        if (!spaces) *out++ = *in;
        in += spaces ? spaces : 1;
    }
    return out - first;
}

/* Hash of each document, as `leaks.document_hashes`: ends are where the documents do. */
void hashes(const u16 *tokens, const int64_t *ends, int64_t count, const u64 *values, u64 *out) {
    for (int64_t at = 0; count--; out++, ends++) {
        *out = 0;
        for (u64 power = 1; at < *ends; power *= FACTOR) *out += values[tokens[at++]] * power;
    }
}

/* Windows of tokens, as `leaks.sampled_windows`: BOS is before each document. Returns how many. */
int64_t windows(const u16 *tokens, int64_t size, const u64 *values, int64_t bos, u64 *found, int32_t *documents) {
    u64 hash = 0, last = FACTOR;
    for (int i = 1; i < 16; i *= 2) last *= last;
    int64_t count = 0, length = 0;
    int32_t document = -1;
    for (int64_t i = 0; i < size; i++) {
        if (tokens[i] == bos) {
            document++, hash = length = 0;
            continue;
        }
        hash = hash * FACTOR + values[tokens[i]];
        if (++length > 16) hash -= values[tokens[i - 16]] * last;
        if (length >= 16 && (hash >> 32) % 16 == 0) found[count] = hash, documents[count++] = document;
    }
    return count;
}

/* A BPE model: symbols are its pieces, the sooner they are made the lower, and behind them the bytes for
characters that are in no piece. */
enum { SYMBOL_BITS = 17 };
static const u64 FREE = ~(u64)0, SYMBOL = ((u64)1 << SYMBOL_BITS) - 1, NEVER = SYMBOL;
typedef u64 Merge;  /* left, right, and what they become, of SYMBOL_BITS each; FREE: none */
typedef struct { u64 key[3]; u16 count, tokens[19]; } Word;  /* key: the bytes, in the last one their number */
typedef struct {
    const int32_t *ascii, *quotes, *operators;  /* (256,) symbols by (last) byte; -1: left to SentencePiece */
    Merge *merges;  /* by hash of the pair */
    const u16 *tokens, *sizes;  /* by symbol its token, by token the bytes of text that it carries */
    Word *words;  /* by hash, the last one that came */
    int64_t merge_mask, word_mask, joins, bos;
} Model;

/* A word that is left to SentencePiece, and where in the tokens those of it are missing. */
typedef struct { int64_t start, length, place, more; } Missing;

static u64 mixed(u64 value) {
    value *= FACTOR;
    return value ^ value >> 32;
}

/* The two places where the merge of a pair may be: found without a loop, whose end would be guessed wrong. */
typedef struct { u64 first, second; } Places;

static Places places(u64 mask, u64 pair) {
    u64 value = mixed(pair);
    return (Places){value & mask, value >> 32 & mask};
}

/* Put merges into a table of more places than there are, a power of two: mask is one less. Of two at one place
the first goes to its other one. Returns 0 if that has no end. */
int64_t fill(Merge *merges, int64_t mask, const Merge *known, int64_t count) {
    memset(merges, 0xFF, (mask + 1) * sizeof *merges);
    for (int64_t i = 0; i < count; i++) {
        Merge own = known[i], other;
        u64 place = places(mask, own >> SYMBOL_BITS).first;
        for (int64_t left = mask; (other = merges[place], merges[place] = own, other != FREE); own = other) {
            Places both = places(mask, other >> SYMBOL_BITS);
            place = place == both.first ? both.second : both.first;
            if (!left--) return 0;
        }
    }
    return 1;
}

/* What two symbols become, NEVER if they do not merge. */
static u64 merged(const Model *model, u64 left, u64 right) {
    u64 pair = left << SYMBOL_BITS | right;
    Places both = places(model->merge_mask, pair);
    Merge first = model->merges[both.first], second = model->merges[both.second];
    u64 found = second >> SYMBOL_BITS == pair ? second : FREE;
    found = first >> SYMBOL_BITS == pair ? first : found;
    return found & SYMBOL;  /* of FREE that is NEVER */
}

/* Merge the symbols of a word: always the pair that becomes the lowest, of equal ones the first. Returns how many. */
static int merge_all(const Model *model, int32_t *symbols, int count) {
    u64 parts[LONGEST];  /* a symbol, above it its place, and above that what it becomes with the next one */
    u16 before[LONGEST + 1], after[LONGEST + 1];  /* places of its neighbours */
    for (int i = 0; i < count; i++) {
        u64 made = i + 1 < count ? merged(model, symbols[i], symbols[i + 1]) : NEVER;
        parts[i] = made << 32 | (u64)i << 20 | symbols[i];
        before[i] = i - 1, after[i] = i + 1;
    }
    for (;;) {
        u64 low = FREE;
        for (int i = 0; i < count; i++) low = parts[i] < low ? parts[i] : low;
        u64 made = low >> 32, place = low >> 20 & 0xFFF, gone = after[place], next = after[gone];
        if (made >= NEVER) break;
        parts[gone] = FREE;
        after[place] = next, before[next] = place;
        low = next < count ? merged(model, made, parts[next] & SYMBOL) : NEVER;
        parts[place] = low << 32 | place << 20 | made;
        if (!place) continue;
        u64 left = parts[before[place]] & (((u64)1 << 32) - 1);
        parts[before[place]] = merged(model, left & SYMBOL, made) << 32 | left;
    }
    int left = 0;
    for (int i = 0; i < count; i = after[i]) symbols[left++] = parts[i] & SYMBOL;
    return left;
}

/* The symbol of the character at a place, and the bytes that it has. */
static int32_t symbol(const Model *model, const u8 *at, int *size) {
    *size = 1;
    if (*at < 0x80) return model->ascii[*at];
    *size = 3;
    if (at[0] == 0xE2 && at[1] == 0x80) return model->quotes[at[2]];
    return at[0] == 0xEE && at[1] == 0x80 ? model->operators[at[2]] : -1;
}

/* Tokens of one word; -1 if that is left to SentencePiece. */
static int word_tokens(const Model *model, const u8 *word, int64_t length, u16 *tokens) {
    int32_t symbols[LONGEST];
    int count = 0, size;
    for (int64_t at = 0; at < length; at += size) {
        int32_t found = symbol(model, word + at, &size);
        if (found < 0 || count == LONGEST || (model->joins && at && word[at] == ' ')) return -1;
        symbols[count++] = found;
    }
    count = merge_all(model, symbols, count);
    for (int i = 0; i < count; i++) tokens[i] = model->tokens[symbols[i]];
    return count;
}

/* A word in its text: `more` is the white space before its own. `known`: where its tokens are remembered. */
typedef struct { const u8 *start; int64_t length, more; u64 key[3]; Word *known; } Cut;

/* A word of which the memory is on its way. Bytes behind the word are read, up to 24 from its start. */
static void cut(const Model *model, Cut *own, const u8 *start, int64_t length, int64_t more) {
    static const u64 ones[6] = {~(u64)0, ~(u64)0, ~(u64)0};
    own->start = start, own->length = length, own->more = more, own->known = NULL;
    if (length > LONGEST_KNOWN) return;
    u64 key[3], kept[3];
    memcpy(key, start, sizeof key);
    memcpy(kept, (const u8 *)ones + 24 - length, sizeof kept);
    for (int i = 0; i < 3; i++) key[i] &= kept[i];
    key[2] |= (u64)length << 56;
    u64 hash = key[0] * FACTOR ^ key[1] * 0xC2B2AE3D27D4EB4F ^ key[2] * 0x165667B19E3779F9;
    own->known = model->words + (mixed(hash ^ hash >> 32) & model->word_mask & ~1);
    for (int i = 0; i < 3; i++) own->key[i] = key[i];
    __builtin_prefetch(own->known);
}

static int is_other(const Word *known, const Cut *word) {
    const u64 *a = known->key, *b = word->key;
    return ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2])) != 0;
}

/* Tokens of a word, remembered or made now; -1 if it is left to SentencePiece. 19 are written to in any case. */
static int known_tokens(const Model *model, const Cut *word, u16 *tokens) {
    Word *known = word->known;
    if (known) {
        const Word *found = known + is_other(known, word);
        if (!is_other(found, word)) {
            memcpy(tokens, found->tokens, sizeof found->tokens);
            return found->count;
        }
    }
    int count = word_tokens(model, word->start, word->length, tokens);
    if (known && count >= 0 && count <= 19) {  /* in place of the older one of two */
        known[1] = known[0];
        memcpy(known->key, word->key, sizeof word->key);
        memcpy(known->tokens, tokens, sizeof *tokens * count);
        known->count = count;
    }
    return count;
}

static int is_quote(const u8 *at) {  /* or a dash: U+2013, U+2014, U+2018, U+2019, U+201C, U+201D */
    static const u8 last[] = {0x93, 0x94, 0x98, 0x99, 0x9C, 0x9D};
    return at[0] == 0xE2 && at[1] == 0x80 && memchr(last, at[2], sizeof last);
}

static int is_space(const Model *model, u8 byte) {
    return byte == ' ' || (model->joins && (byte == '\t' || byte == '\n' || byte == '\f' || byte == '\r'));
}

/* The first byte of at most a space, or the end; up to seven bytes behind that are read. */
static u8 *blank(u8 *at, u8 *end) {
    static const u64 each = 0x0101010101010101;
    for (; at < end; at += 8) {
        u64 bytes;
        memcpy(&bytes, at, 8);
        u64 found = (bytes - each * (' ' + 1)) & ~bytes & each << 7;
        if (found) return at + __builtin_ctzll(found) / 8 < end ? at + __builtin_ctzll(found) / 8 : end;
    }
    return end;
}

/* Tokens of texts, BOS before each, without those of words that are left to SentencePiece.

raw: is written to, and has 32 bytes behind the last 0xFF. tokens: has room for one a byte, and 32.
carried: the bytes of CaseOps text that each token carries, or none. ends: of each text's tokens.
Returns how many words are missing. */
int64_t encode(const Model *model, u8 *raw, int64_t size, u16 *tokens, int64_t *carried, int64_t *ends,
               Missing *missing) {
    int64_t place = 0, absent = 0;
    int ahead = 0;
    Cut cuts[AHEAD];
    const u8 *last = raw + size - 1;
    for (u8 *at = raw; at < last;) {
        u8 *start = ++at, *end = memchr(at, 0xFF, last + 1 - at), *next = end;
        if (carried) carried[place] = 0;
        tokens[place++] = model->bos;
        while (model->joins && start < end && is_space(model, *start)) start++;
        while (model->joins && start < end && is_space(model, end[-1])) end--;
        int64_t more = 0;  /* white space before the word, but for the one byte that belongs to it */
        for (at = start; start < end;) {
            u8 *stop = end, *after = end;
            for (; (at = blank(at, end)) < end; at++) {
                if (!is_space(model, *at)) continue;
                for (after = at + 1; model->joins && is_space(model, *after);) after++;
                int begins = is_printable(*after) || is_quote(after) || is_operator(after);
                if (begins && at > start && (is_printable(at[-1]) || (at - start >= 3 && is_quote(at - 3)))) {
                    stop = at;
                    break;
                }
                at = after - 1;
            }
            cut(model, cuts + ahead++, start, stop - start, more);
            for (Cut *word = cuts; (ahead == AHEAD || stop == end) && word < cuts + ahead; word++) {
                int count = known_tokens(model, word, tokens + place);
                if (count < 0) {
                    missing[absent++] = (Missing){word->start - raw, word->length, place, word->more};
                    continue;
                }
                for (int i = 0; carried && i < count; i++) carried[place + i] = model->sizes[tokens[place + i]];
                if (carried) carried[place] += word->more;
                place += count;
            }
            if (ahead == AHEAD || stop == end) ahead = 0;
            if (stop == end) break;
            more = after - stop - 1;
            start = after - 1, at = after;
            if (*start != ' ') *start = ' ';  /* `cut` reads it at once: a write would be waited for */
        }
        *ends++ = place;
        at = next;
    }
    return absent;
}
