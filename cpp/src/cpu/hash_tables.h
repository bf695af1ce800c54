// hash_tables.h -- the buckets of a hash index: flat arrays a table, changed in place
//
// A table is an array of row numbers, bucket after bucket, each with a little room to grow. What finds no room waits beside the
// table, in order, and when too much does, the table is laid out anew from the keys, which are kept: no row is hashed for that.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "cpu/hash_functions.h"
#include "widehead/hash_index.h"

namespace widehead::cpu {

using i64 = std::int64_t;
using u32 = std::uint32_t;

// Keys of one table, in 2 or 4 bytes.
class KeyColumn {
 public:
  void resize(i64 rows, int bits);
  u32 get(i64 row) const {
    if (!narrow_) return wide_data_[static_cast<std::size_t>(row)];
    const std::uint16_t key = narrow_data_[static_cast<std::size_t>(row)];
    return key == 0xFFFFu ? kNoKey : key;
  }
  void set(i64 row, u32 key) {
    if (narrow_)
      narrow_data_[static_cast<std::size_t>(row)] = static_cast<std::uint16_t>(key);
    else
      wide_data_[static_cast<std::size_t>(row)] = key;
  }
  i64 bytes() const { return static_cast<i64>(narrow_data_.size() * 2 + wide_data_.size() * 4); }

 private:
  bool narrow_ = false;
  std::vector<std::uint16_t> narrow_data_;
  std::vector<u32> wide_data_;
};

class HashTable {
 public:
  struct Span {
    const u32* begin;
    u32 size;
  };
  struct Spilled {
    u32 key, id;
    bool operator<(const Spilled& other) const { return key != other.key ? key < other.key : id < other.id; }
  };

  void resize(i64 rows, int bits);
  // Lays out all buckets by the keys.
  void rebuild();
  // Returns whether the row moved.
  bool move(u32 row, u32 key);

  KeyColumn keys;
  Span bucket(u32 key) const { return {ids_.data() + starts_[key], sizes_[key]}; }
  // Rows of a bucket that wait beside the table, ascending.
  std::pair<const Spilled*, const Spilled*> spilled(u32 key) const;
  bool has_spilled() const { return !spill_.empty(); }

  i64 rebuilds() const { return rebuilds_; }
  i64 spilled_entries() const { return static_cast<i64>(spill_.size()); }
  i64 bytes() const;
  void sizes(i64& used, i64& largest, i64& entries) const;

 private:
  void remove(u32 row, u32 key);
  void insert(u32 row, u32 key);

  i64 rows_ = 0;
  std::vector<u32> starts_, sizes_, ids_;
  std::vector<Spilled> spill_;
  i64 rebuilds_ = 0;
};

}  // namespace widehead::cpu

namespace widehead {

// The state of a HashIndex.
class HashTables {
 public:
  HashTables(std::int64_t features, bool bias, const HashOptions& options);

  void build(const ConstAnyMatrix& weight, const ConstAnyVector& bias);
  std::int64_t update(const std::int64_t* ids, std::int64_t n, const ConstAnyMatrix& weight,
                      const ConstAnyVector& bias);
  void query(const HashQuery& query) const;
  void keys(const ConstAnyMatrix& rows, const ConstAnyVector& bias, std::int32_t* out) const;
  HashStatistics statistics() const;

  const std::int64_t features;
  const bool bias;
  const HashOptions options;
  std::int64_t rows = 0;

 private:
  // put(table, i, key) for each of the rows, chunk by chunk, in parallel.
  template <class Put>
  void hash(const ConstAnyMatrix& weight, const ConstAnyVector& bias_data, const std::int64_t* ids, std::int64_t n,
            Put put) const;

  cpu::HashDraws draws_;
  std::vector<cpu::HashTable> tables_;
};

}  // namespace widehead
