// hash_index.h -- tables of locality-sensitive hashes over the rows of a matrix: which rows may have a large product with a query
//
// A row is in one bucket of each table; the key of the bucket is made of `hashes` codes. Rows that share more buckets with the query
// come first (Dean et al., CVPR 2013; Vijayanarasimhan, Shlens, Monga, Yagnik, arXiv 1412.7479).
#pragma once
#include <cstdint>
#include <memory>

#include "widehead/view.h"

namespace widehead {

// wta      the place of the largest of `window` coordinates drawn at random (Yagnik et al., ICCV 2011), log2(window) bits
// dwta     the same of coordinates that are not zero; a window of zeros takes the code of another one (Chen & Shrivastava, UAI 2018)
// simhash  the sign of the product with a vector of random signs (Charikar, STOC 2002), one bit
enum class HashFamily : std::uint8_t { wta, dwta, simhash };
const char* name_of(HashFamily family);

struct HashOptions {
  HashFamily family = HashFamily::wta;
  int tables = 50;              // at most 255
  int hashes = 4;               // codes a key; a key has at most 24 bits
  int window = 8;               // coordinates of a code, at least 2; simhash has none
  std::int64_t max_bucket = 0;  // queries pass over buckets with more rows; 0: none
  std::uint64_t seed = 0;
};
// Bits of a key.
int key_bits(const HashOptions& options);

struct HashQuery {
  ConstAnyMatrix hidden = {};   // [B, d]
  bool ranked = true;           // else the rows come in an order that means nothing
  std::int64_t candidates = 0;  // at most so many rows a query
  int probes =
      0;  // further buckets a table, at most `hashes`: each with the code changed that was decided most narrowly
  std::int64_t* ids = nullptr;     // [B, candidates] most collisions first, then by row; -1 where there are no more
  std::int32_t* counts = nullptr;  // [B, candidates] or null: tables in which they met
};

struct HashStatistics {
  std::int64_t rows;      // in the tables
  std::int64_t absent;    // with a NaN (dwta: or nothing but zeros), which are in no table
  std::int64_t buckets;   // of all tables
  std::int64_t used;      // that hold a row
  std::int64_t largest;   // rows of the largest
  std::int64_t spilled;   // entries that wait beside their tables for room
  std::int64_t bytes;     // of everything kept
  std::int64_t rebuilds;  // of single tables, for want of room
};

class HashTables;

// The tables keep keys and numbers of rows, not the rows. Queries may run in several threads at a time, changes alone.
// The same tables for the same seed, on any number of threads, of any instruction set; simhash apart from projections within rounding
// of zero, whose sums are nevertheless made in one order everywhere.
class HashIndex {
 public:
  // For rows of d features, and, with `bias`, one more coordinate: the bias of a row, 1 of a query. Throws ShapeError for
  // options out of range.
  HashIndex(std::int64_t features, bool bias, const HashOptions& options);
  ~HashIndex();
  HashIndex(HashIndex&&) noexcept;
  HashIndex& operator=(HashIndex&&) noexcept;

  // Hashes all rows anew. weight [N, d], bias [N], each float32 | bfloat16 | float16 | float64, hashed as float32.
  // Throws ShapeError, DtypeError before anything changes.
  void build(const ConstAnyMatrix& weight, const ConstAnyVector& bias);
  // Hashes the rows ids[i] of `weight` anew; the others stay where they are. The tables are then what build() would make
  // of the rows. Returns how many entries moved. Throws LabelError for rows out of range, and as build().
  std::int64_t update(const std::int64_t* ids, std::int64_t n, const ConstAnyMatrix& weight,
                      const ConstAnyVector& bias);
  void query(const HashQuery& query) const;
  // Bucket of each row in each table, [n, tables]; -1 in no table. `bias` of a query: empty, for 1.
  void keys(const ConstAnyMatrix& rows, const ConstAnyVector& bias, std::int32_t* out) const;

  std::int64_t rows() const;
  std::int64_t features() const;
  bool has_bias() const;
  const HashOptions& options() const;
  HashStatistics statistics() const;

 private:
  std::unique_ptr<HashTables> tables_;
};

}  // namespace widehead
