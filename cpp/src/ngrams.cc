// ngrams.cc -- hashed character n-grams and typing errors, string by string
#include "widehead/ngrams.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "widehead/error.h"
#include "widehead/parallel.h"
#include "widehead/random.h"

namespace widehead {
namespace {

constexpr std::int64_t kChunk =
    128;  // strings a task: about a quarter of a millisecond, so that a batch occupies several threads
enum Space : std::uint64_t { kText = 0, kRomanised = 1, kWholeWord = 2 };

std::uint64_t hash_start(std::uint64_t space) { return 0x243F6A8885A308D3u + space * 0x9E3779B97F4A7C15u; }
std::uint64_t hash_step(std::uint64_t h, std::uint32_t c) {
  h = (h ^ c) * 0x9FB21C651E98DF25u;
  return h ^ (h >> 29);
}
std::uint32_t hash_feature(std::uint64_t h, std::uint64_t n_features) {
  const std::uint64_t x = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93u;
  return static_cast<std::uint32_t>(((x >> 32) * n_features) >> 32);
}

// The White_Space property of Unicode, and the four information separators that Python's str.split takes as well.
bool is_blank(std::uint32_t c) {
  if (c <= 0x20) return c == 0x20 || (c >= 0x09 && c <= 0x0D) || c >= 0x1C;
  if (c < 0x1680) return c == 0x85 || c == 0xA0;
  return c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

using Span = std::span<const std::uint32_t>;
Span string_at(const Strings& s, std::int64_t i) {
  return {s.text + s.offsets[i], static_cast<std::size_t>(s.offsets[i + 1] - s.offsets[i])};
}

void check_strings(const Strings& s) {
  if (s.size < 0) throw ShapeError("strings: expected a count of at least 0, got " + std::to_string(s.size));
  for (std::int64_t i = 0; i < s.size; ++i)
    if (s.offsets[i + 1] < s.offsets[i])
      throw ShapeError("strings: offsets decrease after string " + std::to_string(i));
}

class Extractor {
 public:
  explicit Extractor(const NgramOptions& options) : o_(options) {}

  // Appends the features of one string to `indices` and `values`, ascending.
  void add(Span text, const Span* romanised, std::vector<std::int32_t>& indices, std::vector<float>& values) {
    features_.clear();
    grams(text, kText);
    if (romanised != nullptr) {
      if (o_.separate)
        grams(*romanised, kRomanised);
      else if (!std::ranges::equal(*romanised, text))
        grams(*romanised, kText);
    }
    std::sort(features_.begin(), features_.end());
    const std::size_t first = values.size();
    for (std::size_t i = 0; i < features_.size();) {
      std::size_t j = i + 1;
      while (j < features_.size() && features_[j] == features_[i]) ++j;
      indices.push_back(static_cast<std::int32_t>(features_[i]));
      values.push_back(o_.binary ? 1.0f : static_cast<float>(j - i));
      i = j;
    }
    normalise(values, first);
  }

 private:
  void grams(Span text, std::uint64_t space) {
    const std::uint64_t start = hash_start(space);
    const std::size_t length = text.size();
    for (std::size_t i = 0; i < length;) {
      while (i < length && is_blank(text[i])) ++i;
      if (i == length) break;
      if (o_.words || word_.empty()) word_.assign(1, ' ');
      for (; i < length && !is_blank(text[i]); ++i) word_.push_back(text[i]);
      word_.push_back(' ');
      if (o_.words) {
        if (o_.whole_words && space == kText) whole_word();
        word_grams(start);
      }
    }
    if (!o_.words && !word_.empty()) {
      // The blanks at both ends mark them, as in words; between words there is exactly one.
      word_grams(start);
    }
    word_.clear();
  }

  void word_grams(std::uint64_t start) {
    const auto length = static_cast<std::int64_t>(word_.size());
    const std::int64_t shortest = std::min<std::int64_t>(o_.min_n, length);
    for (std::int64_t i = 0; i + shortest <= length; ++i) {
      std::uint64_t h = start;
      const std::int64_t longest = std::min<std::int64_t>(o_.max_n, length - i);
      for (std::int64_t n = 1; n <= longest; ++n) {
        h = hash_step(h, word_[static_cast<std::size_t>(i + n - 1)]);
        if (n >= shortest) emit(h);
      }
    }
  }

  void whole_word() {
    std::uint64_t h = hash_start(kWholeWord);
    for (std::size_t i = 1; i + 1 < word_.size(); ++i) h = hash_step(h, word_[i]);
    emit(h);
  }

  void emit(std::uint64_t h) { features_.push_back(hash_feature(h, static_cast<std::uint64_t>(o_.n_features))); }

  void normalise(std::vector<float>& values, std::size_t first) const {
    if (o_.norm == NgramNorm::none) return;
    double sum = 0.0;
    for (std::size_t i = first; i < values.size(); ++i)
      sum += o_.norm == NgramNorm::l1 ? values[i] : double{values[i]} * values[i];
    const double factor = 1.0 / (o_.norm == NgramNorm::l1 ? sum : std::sqrt(sum));
    for (std::size_t i = first; i < values.size(); ++i) values[i] = static_cast<float>(values[i] * factor);
  }

  const NgramOptions& o_;
  std::vector<std::uint32_t> features_, word_;
};

struct Chunk {
  std::vector<std::int32_t> indices;
  std::vector<float> values;
};

// One edit in place; `text` has room for one more code point. Returns the new length.
std::int64_t edit(std::uint32_t* text, std::int64_t length, const Philox4& r) {
  const auto pick = [](std::uint32_t bits, std::int64_t n) {
    return static_cast<std::int64_t>((std::uint64_t{bits} * static_cast<std::uint64_t>(n)) >> 32);
  };
  const std::int64_t at = pick(r.v[1], length);
  // A letter from at most three places away, or from the alphabet of that letter.
  const std::int64_t low = std::max<std::int64_t>(0, at - 3), high = std::min(length, at + 4);
  std::uint32_t letter = text[low + pick(r.v[2], high - low)];
  if (r.v[3] & 1u) {
    if (letter >= 'a' && letter <= 'z') letter = 'a' + static_cast<std::uint32_t>(pick(r.v[3], 26));
    if (letter >= 0x430 && letter <= 0x44F) letter = 0x430 + static_cast<std::uint32_t>(pick(r.v[3], 32));
  }
  switch (pick(r.v[0], 4)) {
    case 0:
      if (length < 2) return length;
      std::copy(text + at + 1, text + length, text + at);
      return length - 1;
    case 1:
      std::copy_backward(text + at, text + length, text + length + 1);
      text[at] = letter;
      return length + 1;
    case 2: text[at] = letter; return length;
    default:
      if (at + 1 < length) std::swap(text[at], text[at + 1]);
      return length;
  }
}

}  // namespace

NgramRows hash_ngrams(const Strings& strings, const Strings* romanised, const NgramOptions& options) {
  check_strings(strings);
  if (romanised != nullptr) {
    check_strings(*romanised);
    if (romanised->size != strings.size)
      throw ShapeError("romanised: expected as many strings as there are, " + std::to_string(strings.size) + ", got " +
                       std::to_string(romanised->size));
  }
  if (options.n_features < 1 || options.n_features > INT32_MAX)
    throw ShapeError("n_features: expected 1 to 2^31 - 1, got " + std::to_string(options.n_features));
  if (options.min_n < 1 || options.max_n < options.min_n || options.max_n > 64)
    throw ShapeError("ngram_range: expected 1 <= shortest <= longest <= 64, got (" + std::to_string(options.min_n) +
                     ", " + std::to_string(options.max_n) + ")");
  const std::int64_t n = strings.size, n_chunks = (n + kChunk - 1) / kChunk;
  NgramRows rows;
  rows.indptr = std::make_unique<std::int64_t[]>(static_cast<std::size_t>(n + 1));
  std::vector<Chunk> chunks(static_cast<std::size_t>(n_chunks));
  parallel_for(n_chunks, [&](std::int64_t c) {
    Chunk& chunk = chunks[static_cast<std::size_t>(c)];
    Extractor extractor(options);
    for (std::int64_t i = c * kChunk; i < std::min(n, (c + 1) * kChunk); ++i) {
      const std::size_t before = chunk.indices.size();
      const Span roman = romanised ? string_at(*romanised, i) : Span{};
      extractor.add(string_at(strings, i), romanised ? &roman : nullptr, chunk.indices, chunk.values);
      rows.indptr[static_cast<std::size_t>(i + 1)] = static_cast<std::int64_t>(chunk.indices.size() - before);
    }
  });
  for (std::int64_t i = 0; i < n; ++i) rows.indptr[i + 1] += rows.indptr[i];
  rows.nnz = rows.indptr[n];
  rows.indices = std::make_unique_for_overwrite<std::int32_t[]>(static_cast<std::size_t>(rows.nnz));
  rows.values = std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(rows.nnz));
  parallel_for(n_chunks, [&](std::int64_t c) {
    Chunk& chunk = chunks[static_cast<std::size_t>(c)];
    const std::int64_t first = rows.indptr[c * kChunk];
    std::copy(chunk.indices.begin(), chunk.indices.end(), rows.indices.get() + first);
    std::copy(chunk.values.begin(), chunk.values.end(), rows.values.get() + first);
    chunk = Chunk{};  // frees it: the chunks and the result together are the peak of memory
  });
  return rows;
}

OwnedStrings transliterate(const Strings& strings, const Strings& table) {
  check_strings(strings);
  check_strings(table);
  const std::int64_t n = strings.size, n_chunks = (n + kChunk - 1) / kChunk;
  OwnedStrings out;
  out.size = n;
  out.offsets = std::make_unique<std::int64_t[]>(static_cast<std::size_t>(n + 1));
  const auto each = [&](const auto& body) {
    parallel_for(n_chunks, [&](std::int64_t c) {
      for (std::int64_t i = c * kChunk; i < std::min(n, (c + 1) * kChunk); ++i) body(i);
    });
  };
  each([&](std::int64_t i) {
    std::int64_t length = 0;
    for (const std::uint32_t c : string_at(strings, i))
      length += c < table.size ? table.offsets[c + 1] - table.offsets[c] : 1;
    out.offsets[static_cast<std::size_t>(i + 1)] = length;
  });
  for (std::int64_t i = 0; i < n; ++i) out.offsets[i + 1] += out.offsets[i];
  out.text = std::make_unique_for_overwrite<std::uint32_t[]>(static_cast<std::size_t>(out.offsets[n]));
  each([&](std::int64_t i) {
    std::uint32_t* to = out.text.get() + out.offsets[i];
    for (const std::uint32_t c : string_at(strings, i)) {
      if (c < table.size)
        to = std::copy(table.text + table.offsets[c], table.text + table.offsets[c + 1], to);
      else
        *to++ = c;
    }
  });
  return out;
}

OwnedStrings add_typos(const Strings& strings, const TypoOptions& options) {
  check_strings(strings);
  for (const double p : {options.rate, options.second})
    if (!(p >= 0.0 && p <= 1.0)) throw ShapeError("rate: expected a probability in [0, 1], got " + std::to_string(p));
  const std::int64_t n = strings.size, n_chunks = (n + kChunk - 1) / kChunk;
  const RandomStream random{options.seed, Purpose::noise, options.step};
  const auto threshold = [](double p) { return static_cast<std::uint64_t>(std::ldexp(p, 32)); };
  const std::uint64_t rate = threshold(options.rate), second = threshold(options.second);
  // Two edits lengthen a string by two at most: string i gets the place of its text and two more.
  const std::int64_t base = n > 0 ? strings.offsets[0] : 0;
  const auto room = static_cast<std::size_t>((n > 0 ? strings.offsets[n] - base : 0) + 2 * n);
  const auto scratch = std::make_unique_for_overwrite<std::uint32_t[]>(room);
  OwnedStrings out;
  out.size = n;
  out.offsets = std::make_unique<std::int64_t[]>(static_cast<std::size_t>(n + 1));
  parallel_for(n_chunks, [&](std::int64_t c) {
    for (std::int64_t i = c * kChunk; i < std::min(n, (c + 1) * kChunk); ++i) {
      std::uint32_t* text = scratch.get() + (strings.offsets[i] - base) + 2 * i;
      std::int64_t length = strings.offsets[i + 1] - strings.offsets[i];
      std::copy_n(strings.text + strings.offsets[i], length, text);
      const auto row = static_cast<std::uint64_t>(options.first_row + i);
      const Philox4 choice = random.block(row, 0);
      if (length > 0 && choice.v[0] < rate) {
        length = edit(text, length, random.block(row, 1));
        if (choice.v[1] < second) length = edit(text, length, random.block(row, 2));
      }
      out.offsets[static_cast<std::size_t>(i + 1)] = length;
    }
  });
  for (std::int64_t i = 0; i < n; ++i) out.offsets[i + 1] += out.offsets[i];
  out.text = std::make_unique_for_overwrite<std::uint32_t[]>(static_cast<std::size_t>(out.offsets[n]));
  parallel_for(n_chunks, [&](std::int64_t c) {
    for (std::int64_t i = c * kChunk; i < std::min(n, (c + 1) * kChunk); ++i)
      std::copy_n(scratch.get() + (strings.offsets[i] - base) + 2 * i, out.offsets[i + 1] - out.offsets[i],
                  out.text.get() + out.offsets[i]);
  });
  return out;
}

}  // namespace widehead
