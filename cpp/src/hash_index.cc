// hash_index.cc -- checks what the hash index is given before anything of it changes
#include "widehead/hash_index.h"

#include <string>

#include "check.h"
#include "cpu/hash_tables.h"
#include "widehead/error.h"

namespace widehead {
namespace {

using std::int64_t;
using std::to_string;

int code_bits(const HashOptions& options) {
  if (options.family == HashFamily::simhash) return 1;
  int bits = 1;
  while ((1 << bits) < options.window) ++bits;
  return bits;
}

void expect(bool ok, const std::string& message) {
  if (!ok) throw ShapeError(message);
}

void check_rows(const char* name, const ConstAnyMatrix& rows, const ConstAnyVector& bias, int64_t features,
                bool has_bias, bool optional_bias) {
  expect_dtype(name, rows.dtype, floating(rows.dtype), "float32, bfloat16, float16 or float64");
  expect_shape(name, rows, rows.rows, features);
  if (!bias && (!has_bias || optional_bias)) return;
  expect(has_bias, "bias: expected none of an index without a bias");
  expect_size("bias", bias, rows.rows, true);
  expect_dtype("bias", bias.dtype, floating(bias.dtype), "float32, bfloat16, float16 or float64");
}

}  // namespace

const char* name_of(HashFamily family) {
  switch (family) {
    case HashFamily::wta: return "wta";
    case HashFamily::dwta: return "dwta";
    default: return "simhash";
  }
}

int key_bits(const HashOptions& options) { return options.hashes * code_bits(options); }

HashIndex::HashIndex(int64_t features, bool bias, const HashOptions& options) {
  expect(features >= 1, "features: expected at least 1, got " + to_string(features));
  expect(options.tables >= 1 && options.tables <= 255, "tables: expected 1 to 255, got " + to_string(options.tables));
  expect(options.hashes >= 1 && options.hashes <= 24, "hashes: expected 1 to 24, got " + to_string(options.hashes));
  expect(options.window >= 2 && options.window <= 256, "window: expected 2 to 256, got " + to_string(options.window));
  expect(options.max_bucket >= 0, "max_bucket: expected at least 0, got " + to_string(options.max_bucket));
  expect(key_bits(options) <= 24, "hashes: expected keys of at most 24 bits, got " + to_string(options.hashes) +
                                      " codes of " + to_string(code_bits(options)) + " bits");
  tables_ = std::make_unique<HashTables>(features, bias, options);
}
HashIndex::~HashIndex() = default;
HashIndex::HashIndex(HashIndex&&) noexcept = default;
HashIndex& HashIndex::operator=(HashIndex&&) noexcept = default;

void HashIndex::build(const ConstAnyMatrix& weight, const ConstAnyVector& bias) {
  check_rows("weight", weight, bias, features(), has_bias(), false);
  // Numbers of entries with their room are kept in 32 bits.
  constexpr int64_t kMost = int64_t{3} << 30;
  if (weight.rows > kMost)
    throw CapacityError("weight: expected at most " + to_string(kMost) + " rows, got " + to_string(weight.rows));
  tables_->build(weight, bias);
}

int64_t HashIndex::update(const int64_t* ids, int64_t n, const ConstAnyMatrix& weight, const ConstAnyVector& bias) {
  check_rows("weight", weight, bias, features(), has_bias(), false);
  expect(weight.rows == rows(),
         "weight: expected the " + to_string(rows()) + " rows of the index, got " + to_string(weight.rows));
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= rows())
      throw LabelError("ids: expected a row in [0, " + to_string(rows()) + "), got " + to_string(ids[i]) +
                       " at position " + to_string(i));
  return tables_->update(ids, n, weight, bias);
}

void HashIndex::query(const HashQuery& query) const {
  check_rows("hidden", query.hidden, {}, features(), has_bias(), true);
  expect(query.candidates >= 1, "candidates: expected at least 1, got " + to_string(query.candidates));
  expect(query.probes >= 0 && query.probes <= options().hashes,
         "probes: expected 0 to " + to_string(options().hashes) + ", got " + to_string(query.probes));
  tables_->query(query);
}

void HashIndex::keys(const ConstAnyMatrix& of, const ConstAnyVector& bias, std::int32_t* out) const {
  check_rows("rows", of, bias, features(), has_bias(), true);
  tables_->keys(of, bias, out);
}

int64_t HashIndex::rows() const { return tables_->rows; }
int64_t HashIndex::features() const { return tables_->features; }
bool HashIndex::has_bias() const { return tables_->bias; }
const HashOptions& HashIndex::options() const { return tables_->options; }
HashStatistics HashIndex::statistics() const { return tables_->statistics(); }

}  // namespace widehead
