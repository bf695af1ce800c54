// hash_tables.cc -- building the buckets, and moving rows between them
#include "cpu/hash_tables.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "widehead/parallel.h"

namespace widehead::cpu {
namespace {

// Room for growth: enough that a table with entries moving at random is seldom laid out anew.
u32 with_room(u32 size) { return size + size / 8 + 2; }
i64 most_spilled(i64 rows) { return std::max<i64>(64, rows / 256); }

}  // namespace

void KeyColumn::resize(i64 rows, int bits) {
  narrow_ = bits < 16;  // the largest number says that a row is in no table
  narrow_data_.assign(narrow_ ? static_cast<std::size_t>(rows) : 0, 0xFFFFu);
  wide_data_.assign(narrow_ ? 0 : static_cast<std::size_t>(rows), kNoKey);
  narrow_data_.shrink_to_fit();
  wide_data_.shrink_to_fit();
}

void HashTable::resize(i64 rows, int bits) {
  rows_ = rows;
  keys.resize(rows, bits);
  starts_.assign(std::size_t{1} << bits, 0);
  sizes_.assign(std::size_t{1} << bits, 0);
}

void HashTable::rebuild() {
  ++rebuilds_;
  spill_.clear();
  std::fill(sizes_.begin(), sizes_.end(), 0u);
  for (i64 row = 0; row < rows_; ++row)
    if (const u32 key = keys.get(row); key != kNoKey) ++sizes_[key];
  u32 end = 0;
  for (std::size_t key = 0; key < starts_.size(); ++key) {
    starts_[key] = end;
    end += with_room(sizes_[key]);
    sizes_[key] = 0;
  }
  ids_.resize(end);
  for (i64 row = 0; row < rows_; ++row)
    if (const u32 key = keys.get(row); key != kNoKey) ids_[starts_[key] + sizes_[key]++] = static_cast<u32>(row);
}

bool HashTable::move(u32 row, u32 key) {
  const u32 before = keys.get(row);
  if (before == key) return false;
  if (before != kNoKey) remove(row, before);
  keys.set(row, key);
  if (key != kNoKey) insert(row, key);
  return true;
}

void HashTable::remove(u32 row, u32 key) {
  u32* const bucket = ids_.data() + starts_[key];
  u32* const end = bucket + sizes_[key];
  u32* const at = std::find(bucket, end, row);
  if (at != end) {
    *at = *(end - 1);
    --sizes_[key];
    return;
  }
  spill_.erase(std::lower_bound(spill_.begin(), spill_.end(), Spilled{key, row}));
}

void HashTable::insert(u32 row, u32 key) {
  const u32 end = key + 1 < starts_.size() ? starts_[key + 1] : static_cast<u32>(ids_.size());
  if (starts_[key] + sizes_[key] < end) {
    ids_[starts_[key] + sizes_[key]++] = row;
    return;
  }
  if (static_cast<i64>(spill_.size()) >= most_spilled(rows_)) return rebuild();  // by the keys, this row's among them
  const Spilled entry{key, row};
  spill_.insert(std::lower_bound(spill_.begin(), spill_.end(), entry), entry);
}

std::pair<const HashTable::Spilled*, const HashTable::Spilled*> HashTable::spilled(u32 key) const {
  const auto first = std::lower_bound(spill_.begin(), spill_.end(), Spilled{key, 0});
  auto last = first;
  while (last != spill_.end() && last->key == key) ++last;
  return {spill_.data() + (first - spill_.begin()), spill_.data() + (last - spill_.begin())};
}

i64 HashTable::bytes() const {
  return static_cast<i64>((starts_.size() + sizes_.size() + ids_.size()) * sizeof(u32) +
                          spill_.capacity() * sizeof(Spilled)) +
         keys.bytes();
}

void HashTable::sizes(i64& used, i64& largest, i64& entries) const {
  for (std::size_t key = 0; key < sizes_.size(); ++key) {
    i64 size = sizes_[key];
    if (has_spilled()) {
      const auto [first, last] = spilled(static_cast<u32>(key));
      size += last - first;
    }
    used += size > 0;
    largest = std::max(largest, size);
    entries += size;
  }
}

}  // namespace widehead::cpu

namespace widehead {

using cpu::i64;
using cpu::u32;

HashTables::HashTables(i64 features_, bool bias_, const HashOptions& options_)
    : features(features_),
      bias(bias_),
      options(options_),
      draws_(features_ + (bias_ ? 1 : 0), options_),
      tables_(static_cast<std::size_t>(options_.tables)) {}

template <class Put>
void HashTables::hash(const ConstAnyMatrix& weight, const ConstAnyVector& bias_data, const i64* ids, i64 n,
                      Put put) const {
  constexpr i64 kChunk = 1024;
  const cpu::HashKernels& kernels = cpu::kernels().hash;
  const cpu::HashFunctions& f = draws_.functions();
  parallel_for((n + kChunk - 1) / kChunk, [&](i64 chunk) {
    const i64 first = chunk * kChunk, size = std::min(kChunk, n - first);
    std::vector<float> scratch(static_cast<std::size_t>(cpu::hash_scratch(f, kernels.lanes)));
    std::vector<u32> found(static_cast<std::size_t>(f.tables * size));
    kernels.rows({&f, weight, bias_data, bias, ids, first, size, found.data(), size, nullptr, nullptr}, scratch.data());
    for (i64 t = 0; t < f.tables; ++t)
      for (i64 i = 0; i < size; ++i) put(t, first + i, found[static_cast<std::size_t>(t * size + i)]);
  });
}

void HashTables::build(const ConstAnyMatrix& weight, const ConstAnyVector& bias_data) {
  if (weight.rows != rows) {
    for (cpu::HashTable& table : tables_) table.resize(weight.rows, key_bits(options));
    rows = weight.rows;
  }
  hash(weight, bias_data, nullptr, rows,
       [&](i64 t, i64 i, u32 key) { tables_[static_cast<std::size_t>(t)].keys.set(i, key); });
  parallel_for(options.tables, [&](i64 t) { tables_[static_cast<std::size_t>(t)].rebuild(); });
}

i64 HashTables::update(const i64* ids, i64 n, const ConstAnyMatrix& weight, const ConstAnyVector& bias_data) {
  std::vector<u32> found(static_cast<std::size_t>(options.tables * n));
  hash(weight, bias_data, ids, n, [&](i64 t, i64 i, u32 key) { found[static_cast<std::size_t>(t * n + i)] = key; });
  std::vector<i64> moved(static_cast<std::size_t>(options.tables), 0);
  parallel_for(options.tables, [&](i64 t) {
    const auto at = static_cast<std::size_t>(t);
    for (i64 i = 0; i < n; ++i)
      moved[at] += tables_[at].move(static_cast<u32>(ids[i]),
                                    found[at * static_cast<std::size_t>(n) + static_cast<std::size_t>(i)]);
  });
  i64 sum = 0;
  for (const i64 m : moved) sum += m;
  return sum;
}

void HashTables::keys(const ConstAnyMatrix& of, const ConstAnyVector& bias_data, std::int32_t* out) const {
  hash(of, bias_data, nullptr, of.rows,
       [&](i64 t, i64 i, u32 key) { out[i * options.tables + t] = static_cast<std::int32_t>(key); });
}

HashStatistics HashTables::statistics() const {
  HashStatistics out{};
  i64 entries = 0;
  for (const cpu::HashTable& table : tables_) {
    table.sizes(out.used, out.largest, entries);
    out.spilled += table.spilled_entries();
    out.rebuilds += table.rebuilds();
    out.bytes += table.bytes();
  }
  out.rows = entries / options.tables;  // a row is in all tables or in none
  out.absent = rows - out.rows;
  out.buckets = int64_t{options.tables} << key_bits(options);
  out.bytes += draws_.bytes();
  return out;
}

}  // namespace widehead
