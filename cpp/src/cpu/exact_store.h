// exact_store.h -- the rows of the exact head in the caller's memory, with the block each was last written at
#pragma once
#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "cpu/exact_log.h"
#include "widehead/parallel.h"
#include "widehead/view.h"

namespace widehead::cpu {

// A row is [weights | velocities]; the second half only with momentum.
template <class Row, class Factor>
class RowStore {
 public:
  RowStore(Matrix<Row> weight, Matrix<Row> velocity, i64 radix)
      : weight_(weight),
        velocity_(velocity),
        log_(weight.cols * (velocity.data ? 2 : 1), radix),
        labels_(static_cast<std::size_t>(weight.rows), 0) {}

  i64 size() const { return weight_.rows; }
  i64 features() const { return weight_.cols; }
  i64 width() const { return weight_.cols * (velocity_.data ? 2 : 1); }
  const BlockLog<Factor>& log() const { return log_; }
  i64 row_products() const { return row_products_; }
  i64 listed() const {
    i64 n = 0;
    for (const auto& [label, list] : lists_) n += static_cast<i64>(list.ids.size());
    return n;
  }

  // Rows as they are at the end of the log, [n, width]; the sum of the constant part is the caller's.
  Dense<Factor> read(const i64* ids, i64 n) const {
    struct Entry {
      int level, index;
      i64 at;
    };
    std::vector<Entry> order(static_cast<std::size_t>(n));
    for (i64 i = 0; i < n; ++i) {
      const auto place = log_.place(label(ids[i]));
      order[static_cast<std::size_t>(i)] = {place.level, place.index, i};
    }
    // Oldest first: those that have come through a level go on together.
    std::sort(order.begin(), order.end(), [](const Entry& x, const Entry& y) {
      if (x.level != y.level) return x.level > y.level;
      return x.index != y.index ? x.index < y.index : x.at < y.at;
    });
    Dense<Factor> rows(n, width()), other(n, width());
    for (i64 i = 0; i < n; ++i) load(ids[order[static_cast<std::size_t>(i)].at], rows.row(i));
    const auto entry = [&](i64 i) { return order[static_cast<std::size_t>(i)]; };
    const auto end_of = [&](i64 i, int level, int index) {
      while (i < n && entry(i).level == level && entry(i).index == index) ++i;
      return i;
    };
    i64 come = 0;  // rows that have been through all older levels
    for (int level = log_.levels() - 1; level >= 0; --level) {
      if (log_.empty(level)) continue;
      const i64 first = end_of(come, level, 0);
      advance(rows, 0, first, log_.suffix(level, 0), other);
      for (come = first; come < n && entry(come).level == level;) {
        const i64 end = end_of(come, level, entry(come).index);
        advance(rows, come, end, log_.suffix(level, entry(come).index), other);
        come = end;
      }
    }
    for (i64 i = 0; i < n; ++i)
      std::memcpy(other.row(entry(i).at), rows.row(i), static_cast<std::size_t>(width()) * sizeof(Factor));
    return other;
  }

  void write(i64 id, const Factor* row) {
    const i64 d = features();
    Row* w = weight_.data + id * weight_.stride;
    for (i64 k = 0; k < d; ++k) w[k] = static_cast<Row>(row[k]);
    if (!velocity_.data) return;
    Row* v = velocity_.data + id * velocity_.stride;
    for (i64 k = 0; k < d; ++k) v[k] = static_cast<Row>(row[d + k]);
  }

  // The row has left for a block, where it has the place `slot`; what list it stood in does not matter any more.
  void take(i64 id, i64 slot = 0) {
    const auto list = lists_.find(label(id));
    if (list != lists_.end()) drop_stale(list->second, id);
    labels_[static_cast<std::size_t>(id)] = kAway | static_cast<std::uint32_t>(slot);
  }
  // Of a row that has left, else -1.
  i64 slot(i64 id) const {
    const std::uint32_t x = labels_[static_cast<std::size_t>(id)];
    return x & kAway ? static_cast<i64>(x & ~kAway) : -1;
  }
  // A row as of the end of the log.
  void put(i64 id, const Factor* row) {
    const i64 now = log_.end();
    if (label(id) != now) {
      take(id);
      labels_[static_cast<std::size_t>(id)] = static_cast<std::uint32_t>(now);
      lists_[now].ids.push_back(id);
    }
    write(id, row);
  }
  // Ends a block, of matrix I + `block`: rows that were away come back as of after it.
  void close(Dense<Factor> block, const std::vector<i64>& ids, const Dense<Factor>& rows) {
    const i64 now = log_.end() + 1;
    List& list = lists_[now];
    for (std::size_t i = 0; i < ids.size(); ++i) {
      write(ids[i], rows.row(static_cast<i64>(i)));
      labels_[static_cast<std::size_t>(ids[i])] = static_cast<std::uint32_t>(now);
      list.ids.push_back(ids[i]);
    }
    const auto written = lists_.find(now - 1);  // by put(), since the block began
    const i64 rows_written =
        static_cast<i64>(ids.empty() && written != lists_.end() ? written->second.ids.size() : ids.size());
    log_.push(std::move(block), rows_written,
              [&](i64 from, i64 to, const BlockMatrix<Factor>& suffix) { move(from, to, suffix); });
  }

  // All rows as they are, written in place; `finish(id, row)` adds what the store does not know.
  template <class Finish>
  void consolidate(Finish finish) {
    constexpr i64 kRows = 512;
    parallel_for((size() + kRows - 1) / kRows, [&](i64 chunk) {
      std::vector<i64> ids;
      for (i64 id = chunk * kRows; id < std::min(size(), (chunk + 1) * kRows); ++id) ids.push_back(id);
      Dense<Factor> rows = read(ids.data(), static_cast<i64>(ids.size()));
      for (std::size_t i = 0; i < ids.size(); ++i) {
        finish(ids[i], rows.row(static_cast<i64>(i)));
        write(ids[i], rows.row(static_cast<i64>(i)));
      }
    });
    std::fill(labels_.begin(), labels_.end(), 0u);
    lists_.clear();
    log_.clear();
  }

 private:
  static constexpr std::uint32_t kAway = 1u << 31;  // the rest is the slot; a label is below it
  // Rows that had the label when they were put in; those that have it still count.
  struct List {
    std::vector<i64> ids;
    std::size_t stale = 0;
  };

  i64 label(i64 id) const { return labels_[static_cast<std::size_t>(id)]; }

  void load(i64 id, Factor* out) const {
    const i64 d = features();
    const Row* w = weight_.data + id * weight_.stride;
    for (i64 k = 0; k < d; ++k) out[k] = static_cast<Factor>(w[k]);
    if (!velocity_.data) return;
    const Row* v = velocity_.data + id * velocity_.stride;
    for (i64 k = 0; k < d; ++k) out[d + k] = static_cast<Factor>(v[k]);
  }

  // rows[begin, end) *= suffix
  void advance(Dense<Factor>& rows, i64 begin, i64 end, const BlockMatrix<Factor>& suffix, Dense<Factor>& other) const {
    if (begin == end) return;
    Product<Factor> p{};
    p.m = end - begin;
    p.n = p.k = width();
    p.a = rows.row(begin);
    p.b = suffix.matrix.data.data();
    p.c = other.row(begin);
    p.a_stride = p.b_stride = p.c_stride = width();
    p.beta = static_cast<Factor>(suffix.beside_identity);
    std::memcpy(other.row(begin), rows.row(begin), static_cast<std::size_t>(p.m * width()) * sizeof(Factor));
    multiply(p);
    std::memcpy(rows.row(begin), other.row(begin), static_cast<std::size_t>(p.m * width()) * sizeof(Factor));
  }

  void move(i64 from, i64 to, const BlockMatrix<Factor>& suffix) {
    constexpr i64 kRows = 256;
    const auto found = lists_.find(from);
    if (found == lists_.end()) return;
    std::vector<i64> ids;
    for (i64 id : found->second.ids)
      if (label(id) == from) ids.push_back(id);
    lists_.erase(found);
    if (ids.empty()) return;
    List& list = lists_[to];
    for (i64 first = 0; first < static_cast<i64>(ids.size()); first += kRows) {
      const i64 n = std::min(kRows, static_cast<i64>(ids.size()) - first);
      Dense<Factor> rows(n, width()), other(n, width());
      for (i64 i = 0; i < n; ++i) load(ids[static_cast<std::size_t>(first + i)], rows.row(i));
      advance(rows, 0, n, suffix, other);
      for (i64 i = 0; i < n; ++i) {
        const i64 id = ids[static_cast<std::size_t>(first + i)];
        write(id, rows.row(i));
        labels_[static_cast<std::size_t>(id)] = static_cast<std::uint32_t>(to);
        list.ids.push_back(id);
      }
      row_products_ += n;
    }
  }

  // A list that nobody uses for long would fill with rows that have left.
  void drop_stale(List& list, i64 leaving) {
    if (++list.stale * 2 < list.ids.size()) return;
    const i64 from = label(leaving);
    std::erase_if(list.ids, [&](i64 id) { return id == leaving || label(id) != from; });
    list.stale = 0;
  }

  Matrix<Row> weight_, velocity_;
  BlockLog<Factor> log_;
  std::vector<std::uint32_t> labels_;
  std::unordered_map<i64, List> lists_;
  i64 row_products_ = 0;
};

}  // namespace widehead::cpu
