// ngrams.h -- hashed character n-grams of strings, and typing errors for training: text in front of a head
//
// Strings are Unicode code points, so that a length is a number of characters and no encoding can be wrong.
// The hash is fixed for ever: a table trained on one machine reads the same features on every other.
//
//   h = 0x243F6A8885A308D3 + space * 0x9E3779B97F4A7C15            space: 0 text, 1 romanised, 2 whole words (mod 2^64)
//   for each code point c:  h = (h ^ c) * 0x9FB21C651E98DF25;  h = h ^ (h >> 29)
//   x = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93;  feature = ((x >> 32) * n_features) >> 32
#pragma once
#include <cstdint>
#include <memory>

namespace widehead {

// String i is text[offsets[i] .. offsets[i + 1]).
struct Strings {
  const std::uint32_t* text = nullptr;    // [offsets[size]] code points
  const std::int64_t* offsets = nullptr;  // [size + 1]
  std::int64_t size = 0;
};

enum class NgramNorm : std::uint8_t { none, l1, l2 };

struct NgramOptions {
  std::int64_t n_features = std::int64_t{1} << 18;  // 1 to 2^31 - 1
  int min_n = 2;
  int max_n = 4;      // at most 64
  bool words = true;  // n-grams stay inside words, each padded by a space on both sides; else runs of blanks are one
  bool whole_words = false;  // one more feature for every word
  bool separate = false;     // romanised n-grams get features of their own; else they share those of the text
  bool binary = false;       // 1 for every feature that occurs, instead of its count
  NgramNorm norm = NgramNorm::l2;
};

// CSR: row i has indices[indptr[i] .. indptr[i + 1]), ascending and distinct.
struct NgramRows {
  std::unique_ptr<std::int64_t[]> indptr;   // [size + 1]
  std::unique_ptr<std::int32_t[]> indices;  // [nnz]
  std::unique_ptr<float[]> values;          // [nnz]
  std::int64_t nnz = 0;
};

// A padded word shorter than min_n counts once as a whole. Words are separated by Unicode white space. With `romanised`, a
// second form of every string, its n-grams are added where it differs from the string (always, when separate).
// Throws ShapeError for options out of range, offsets that decrease, or counts of strings that differ.
// Same bits for any number of threads.
NgramRows hash_ngrams(const Strings& strings, const Strings* romanised, const NgramOptions& options);

struct OwnedStrings {
  std::unique_ptr<std::uint32_t[]> text;
  std::unique_ptr<std::int64_t[]> offsets;  // [size + 1]
  std::int64_t size = 0;
};

// Replaces code point c by string c of the table; a code point past the table stays as it is.
OwnedStrings transliterate(const Strings& strings, const Strings& table);

struct TypoOptions {
  double rate = 0.1;    // probability that a string gets an edit
  double second = 0.2;  // probability that a string with an edit gets another one
  std::uint64_t seed = 0;
  std::uint64_t step = 0;
  std::int64_t first_row = 0;  // row of string 0 in the random stream
};
// Typing errors: a code point is deleted, doubled or inserted, replaced, or swapped with the next one. New letters come
// from the neighbourhood in the string or, for a-z and the Cyrillic alphabet, from that alphabet. No string becomes empty.
// A pure function of (string, rate, second, seed, step, row): Philox with Purpose::noise.
OwnedStrings add_typos(const Strings& strings, const TypoOptions& options);

}  // namespace widehead
