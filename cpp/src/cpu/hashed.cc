// hashed.cc -- forward and backward passes of the hashed head on the CPU
//
// The classes are cut into a fixed number of parts. What parts add up, the gradient to hidden, is summed in a fixed order.
#include <algorithm>
#include <cmath>

#include "cpu/backend.h"
#include "cpu/hashed_batch.h"
#include "cpu/kernels.h"
#include "widehead/error.h"
#include "widehead/parallel.h"
#include "widehead/random.h"

namespace widehead::cpu {
namespace {

constexpr i64 kSums = 8;  // of the gradient to hidden, each of the parts that leave the same rest

double element(const ConstAnyMatrix& m, i64 at) {
  switch (m.dtype) {
    case Dtype::f64: return static_cast<const double*>(m.data)[at];
    case Dtype::bf16: return static_cast<double>(bf16_float(static_cast<const std::uint16_t*>(m.data)[at]));
    case Dtype::f16: return static_cast<double>(f16_float(static_cast<const std::uint16_t*>(m.data)[at]));
    default: return static_cast<double>(static_cast<const float*>(m.data)[at]);
  }
}
void put(const AnyMatrix& m, i64 at, double x) {
  switch (m.dtype) {
    case Dtype::f64: static_cast<double*>(m.data)[at] = x; break;
    case Dtype::bf16: static_cast<std::uint16_t*>(m.data)[at] = bf16_nearest(static_cast<float>(x)); break;
    case Dtype::f16: static_cast<std::uint16_t*>(m.data)[at] = f16_nearest(static_cast<float>(x)); break;
    default: static_cast<float*>(m.data)[at] = static_cast<float>(x);
  }
}

AnyMatrix writable(const ConstAnyMatrix& m) { return {const_cast<void*>(m.data), m.dtype, m.rows, m.cols, m.stride}; }
AnyVector writable(const ConstAnyVector& v) { return {const_cast<void*>(v.data), v.dtype, v.size}; }

template <class Real>
std::vector<Real>& logits_of(CpuHashedBatch& b) {
  if constexpr (sizeof(Real) == 8)
    return b.logits64;
  else
    return b.logits32;
}
template <class Real>
const std::vector<Real>& logits_of(const CpuHashedBatch& b) {
  return logits_of<Real>(const_cast<CpuHashedBatch&>(b));
}

template <class Real>
void copy_hidden(const ConstAnyMatrix& hidden, std::vector<Real>& out) {
  out.resize(static_cast<std::size_t>(hidden.rows * hidden.cols));
  for (i64 i = 0; i < hidden.rows; ++i)
    for (i64 k = 0; k < hidden.cols; ++k)
      out[static_cast<std::size_t>(i * hidden.cols + k)] = static_cast<Real>(element(hidden, i * hidden.stride + k));
}

template <class Real>
void forward(const HashedForward& args, CpuHashedBatch& batch) {
  std::vector<Real>& logits = logits_of<Real>(batch);
  logits.resize(static_cast<std::size_t>(batch.pairs()));
  const auto parts = static_cast<i64>(batch.parts.size()) - 1;
  parallel_for(parts, [&](i64 p) {
    std::vector<Real> scratch(static_cast<std::size_t>(batch.features));
    kernels().hashed.logits(batch.view(p, writable(args.weight), writable(args.bias)), logits.data(), scratch.data());
  });
  batch.lse.assign(static_cast<std::size_t>(args.hidden.rows), 0.0);
  parallel_for(args.hidden.rows, [&](i64 i) {
    const auto at = static_cast<std::size_t>(i);
    const auto begin = static_cast<std::size_t>(batch.indptr[at]), end = static_cast<std::size_t>(batch.indptr[at + 1]);
    double loss = 0, lse = 0;
    if (begin < end) {
      double top = -INFINITY, sum = 0;
      for (std::size_t e = begin; e < end; ++e)
        top = std::max(top, static_cast<double>(logits[e]) + batch.log_weights[e]);
      for (std::size_t e = begin; e < end; ++e) {
        const double z = static_cast<double>(logits[e]);
        sum += std::exp(z + batch.log_weights[e] - top);
        if (batch.values[e] != 0.0f) loss -= static_cast<double>(batch.values[e]) * z;
      }
      lse = top + std::log(sum);
      loss += batch.mass[at] * lse;
    }
    batch.lse[at] = lse;
    if (args.losses) args.losses[i] = loss;
    if (args.lse) args.lse[i] = lse;
    if (args.output) args.output[i] = -loss;
  });
}

template <class Real>
std::vector<Real> gradients(const CpuHashedBatch& batch, const double* grad_losses) {
  const std::vector<Real>& logits = logits_of<Real>(batch);
  std::vector<Real> out(logits.size());
  parallel_for(batch.examples(), [&](i64 i) {
    const auto at = static_cast<std::size_t>(i);
    const double g = grad_losses[i], mass = batch.mass[at] * g, lse = batch.lse[at];
    for (auto e = static_cast<std::size_t>(batch.indptr[at]); e < static_cast<std::size_t>(batch.indptr[at + 1]); ++e) {
      const double p = std::exp(static_cast<double>(logits[e]) + batch.log_weights[e] - lse);
      out[e] = g == 0 ? Real{0} : static_cast<Real>(mass * p - g * static_cast<double>(batch.values[e]));
    }
  });
  return out;
}

// The part of the caller's rows that are a task's.
AnyMatrix rows_from(const AnyMatrix& m, i64 first, i64 n) {
  if (!m) return {};
  return {static_cast<char*>(m.data) + first * m.stride * size_of(m.dtype), m.dtype, n, m.cols, m.stride};
}
AnyVector rows_from(const AnyVector& v, i64 first, i64 n) {
  if (!v) return {};
  return {static_cast<char*>(v.data) + first * size_of(v.dtype), v.dtype, n};
}

template <class Real>
void backward(const HashedBackward& args, const CpuHashedBatch& batch) {
  const std::vector<Real> grads = gradients<Real>(batch, args.grad_losses);
  const auto parts = static_cast<i64>(batch.parts.size()) - 1;
  const i64 examples = batch.examples(), size = examples * batch.features;
  std::vector<std::vector<Real>> sums(kSums);
  std::vector<std::vector<i64>> moved(static_cast<std::size_t>(parts));
  parallel_for(kSums, [&](i64 s) {
    auto& sum = sums[static_cast<std::size_t>(s)];
    if (args.grad_hidden) sum.assign(static_cast<std::size_t>(size), Real{0});
    std::vector<Real> scratch(static_cast<std::size_t>(3 * batch.features));
    for (i64 p = s; p < parts; p += kSums) {
      const i64 first = batch.parts[static_cast<std::size_t>(p)];
      const HashedRows rows = batch.view(p, args.weight, args.bias);
      auto& far = moved[static_cast<std::size_t>(p)];
      i64 n_far = 0;
      if (args.drift) far.resize(static_cast<std::size_t>(rows.n));
      const HashedStep step{grads.data(),
                            args.grad_hidden ? sum.data() : nullptr,
                            args.update,
                            args.drift,
                            far.data(),
                            &n_far,
                            rows_from(args.grad_rows, first, rows.n),
                            rows_from(args.grad_bias, first, rows.n)};
      kernels().hashed.step(rows, step, scratch.data());
      far.resize(static_cast<std::size_t>(n_far));
    }
  });
  if (args.drift) {
    args.drift->n_moved = 0;
    for (const auto& far : moved)
      for (const i64 row : far) args.drift->moved[args.drift->n_moved++] = row;
  }
  if (!args.grad_hidden) return;
  parallel_for(examples, [&](i64 i) {
    for (i64 k = 0; k < batch.features; ++k) {
      double x = 0;
      for (const auto& sum : sums) x += static_cast<double>(sum[static_cast<std::size_t>(i * batch.features + k)]);
      put(args.grad_hidden, i * args.grad_hidden.stride + k, x);
    }
  });
}

}  // namespace

std::shared_ptr<HashedBatch> hashed_forward(const HashedForward& args) {
  auto batch = std::make_shared<CpuHashedBatch>();
  batch->wide = args.weight.dtype == Dtype::f64;
  batch->n_classes = args.weight.rows;
  batch->features = args.weight.cols;
  make_sets(args, *batch);
  if (batch->wide) {
    copy_hidden(args.hidden, batch->hidden64);
    forward<double>(args, *batch);
  } else {
    copy_hidden(args.hidden, batch->hidden32);
    forward<float>(args, *batch);
  }
  return batch;
}

void hashed_backward(const HashedBackward& args) {
  const auto& batch = static_cast<const CpuHashedBatch&>(*args.batch);
  if (batch.wide) {
    backward<double>(args, batch);
  } else {
    backward<float>(args, batch);
  }
}

}  // namespace widehead::cpu
