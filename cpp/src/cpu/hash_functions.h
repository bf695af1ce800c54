// hash_functions.h -- what the codes of an index look at, drawn from its seed
#pragma once
#include <vector>

#include "cpu/hash.h"
#include "widehead/hash_index.h"

namespace widehead::cpu {

class HashDraws {
 public:
  HashDraws(std::int64_t features, const HashOptions& options);
  const HashFunctions& functions() const { return functions_; }
  HashDraws(const HashDraws&) = delete;
  HashDraws& operator=(const HashDraws&) = delete;
  std::int64_t bytes() const;

 private:
  void draw_places();
  void draw_signs();

  HashFunctions functions_;
  std::vector<std::int32_t> places_;
  std::vector<float> signs_;
};

}  // namespace widehead::cpu
