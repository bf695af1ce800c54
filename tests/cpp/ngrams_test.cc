// ngrams_test.cc -- hashed n-grams and typing errors of strings of code points
#include "widehead/ngrams.h"

#include <set>
#include <vector>

#include "check.h"
#include "widehead/parallel.h"

namespace {

using namespace widehead;

// Owns strings given as code points.
struct Text {
  std::vector<std::uint32_t> text;
  std::vector<std::int64_t> offsets{0};

  explicit Text(const std::vector<std::u32string>& strings) {
    for (const auto& s : strings) {
      text.insert(text.end(), s.begin(), s.end());
      offsets.push_back(static_cast<std::int64_t>(text.size()));
    }
  }
  Strings view() const { return {text.data(), offsets.data(), static_cast<std::int64_t>(offsets.size()) - 1}; }
};

std::u32string at(const OwnedStrings& s, std::int64_t i) {
  return {s.text.get() + s.offsets[i], s.text.get() + s.offsets[i + 1]};
}

// The hash of the header, for one n-gram.
std::int32_t feature(const std::u32string& gram, std::uint64_t n_features) {
  std::uint64_t h = 0x243F6A8885A308D3u;
  for (const char32_t c : gram) {
    h = (h ^ c) * 0x9FB21C651E98DF25u;
    h ^= h >> 29;
  }
  const std::uint64_t x = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93u;
  return static_cast<std::int32_t>(((x >> 32) * n_features) >> 32);
}

TEST(a_word_has_the_ngrams_of_its_padded_form) {
  const Text text({U"", U"ab  c", U"\U0001F3D4"});
  const NgramRows rows = hash_ngrams(text.view(), nullptr, {.n_features = 1 << 20, .norm = NgramNorm::none});
  const std::vector<std::vector<std::u32string>> expected = {
      {},
      {U" a", U"ab", U"b ", U" ab", U"ab ", U" ab ", U" c", U"c ", U" c "},
      {U" \U0001F3D4", U"\U0001F3D4 ", U" \U0001F3D4 "}};
  for (std::size_t i = 0; i < expected.size(); ++i) {
    std::set<std::int32_t> features;
    for (const auto& gram : expected[i]) features.insert(feature(gram, 1 << 20));
    const std::set<std::int32_t> got(rows.indices.get() + rows.indptr[i], rows.indices.get() + rows.indptr[i + 1]);
    CHECK(got == features);
    CHECK_EQ(static_cast<std::size_t>(rows.indptr[i + 1] - rows.indptr[i]), features.size());
  }
  for (std::int64_t j = 0; j < rows.nnz; ++j) CHECK_EQ(rows.values[j], 1.0f);
}

TEST(a_romanised_form_counts_only_where_it_differs) {
  const Text text({U"ab", U"xy"}), roman({U"ab", U"zy"});
  const Strings other = roman.view();
  const NgramRows alone = hash_ngrams(text.view(), nullptr, {});
  const NgramRows both = hash_ngrams(text.view(), &other, {});
  CHECK_EQ(both.indptr[1], alone.indptr[1]);
  CHECK(both.nnz > alone.nnz);
  const Text fewer({U"ab"});
  const Strings short_by_one = fewer.view();
  CHECK_THROWS(ShapeError, hash_ngrams(text.view(), &short_by_one, {}), "romanised");
}

TEST(transliteration_replaces_and_keeps) {
  const Text text({U"cab", U"", U"\u00e9c"});
  std::vector<std::u32string> table(100);
  table['a'] = U"AA";
  table['c'] = U"";
  table['b'] = U"b";
  const Text pieces(table);
  const OwnedStrings out = transliterate(text.view(), pieces.view());
  CHECK(at(out, 0) == U"AAb");
  CHECK(at(out, 1).empty());
  CHECK(at(out, 2) == U"\u00e9");
}

TEST(typos_are_reproducible_for_any_number_of_threads) {
  std::vector<std::u32string> strings(3000, U"saint petersburg");
  strings[7] = U"";
  strings[8] = U"x";
  const Text text(strings);
  const TypoOptions options{.rate = 1.0, .second = 1.0, .seed = 5, .step = 2};
  const int before = get_num_threads();
  set_num_threads(1);
  const OwnedStrings one = add_typos(text.view(), options);
  set_num_threads(4);
  const OwnedStrings four = add_typos(text.view(), options);
  set_num_threads(before);
  int changed = 0;
  for (std::int64_t i = 0; i < one.size; ++i) {
    CHECK(at(one, i) == at(four, i));
    CHECK(at(one, i).empty() == strings[static_cast<std::size_t>(i)].empty());
    changed += at(one, i) != strings[static_cast<std::size_t>(i)];
  }
  CHECK(changed > 2700);
  // The first rows of a longer list are the list of the first rows.
  const Text head({strings.begin() + 100, strings.begin() + 110});
  TypoOptions later = options;
  later.first_row = 100;
  const OwnedStrings part = add_typos(head.view(), later);
  for (std::int64_t i = 0; i < 10; ++i) CHECK(at(part, i) == at(one, 100 + i));
}

TEST(bad_options_are_refused) {
  const Text text({U"ab"});
  CHECK_THROWS(ShapeError, hash_ngrams(text.view(), nullptr, {.n_features = 0}), "n_features");
  CHECK_THROWS(ShapeError, hash_ngrams(text.view(), nullptr, {.min_n = 0}), "ngram_range");
  CHECK_THROWS(ShapeError, hash_ngrams(text.view(), nullptr, {.min_n = 3, .max_n = 2}), "ngram_range");
  CHECK_THROWS(ShapeError, add_typos(text.view(), {.rate = 1.5}), "probability");
  Text falling({U"ab", U"c"});
  falling.offsets[1] = 9;
  CHECK_THROWS(ShapeError, hash_ngrams(falling.view(), nullptr, {}), "offsets decrease");
}

}  // namespace
