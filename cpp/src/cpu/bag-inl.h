// bag-inl.h -- embedding bag, one body for every ISA: included inside the namespace of the unit
//
// Rows are contiguous and the loops over them plain, so the compiler vectorises them; what costs time is that the rows lie at
// random in a table far larger than the cache. So the rows of the entries ahead are requested while this one is added.

constexpr std::int64_t kAhead = 6;  // rows in flight: enough to cover DRAM latency at about 20 ns a row

inline void prefetch_row(const void* data, std::int64_t row, std::int64_t row_bytes) {
  const char* p = static_cast<const char*>(data) + row * row_bytes;
  for (std::int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(p + i);
}
inline void prefetch_row_to_write(const void* data, std::int64_t row, std::int64_t row_bytes) {
  const char* p = static_cast<const char*>(data) + row * row_bytes;
  for (std::int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(p + i, 1);
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) { return bf16_float(x.bits); }

template <class W, class A>
void bag_add(const W* __restrict row, A value, std::int64_t d, A* __restrict sum) {
  for (std::int64_t k = 0; k < d; ++k) sum[k] += value * widen(row[k]);
}

// In float64: the norm of a float32 row of any length is then right to its last bit or so.
template <class A>
double bag_dot(const A* __restrict x, const A* __restrict y, std::int64_t d) {
  double part[8] = {};
  std::int64_t k = 0;
  for (; k + 8 <= d; k += 8)
    for (int i = 0; i < 8; ++i) part[i] += static_cast<double>(x[k + i]) * y[k + i];
  for (; k < d; ++k) part[k & 7] += static_cast<double>(x[k]) * y[k];
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

template <class W, class A, class I>
void bag_forward_rows(const BagForwardPlan& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t d = p.table.cols, row_bytes = p.table.stride * static_cast<std::int64_t>(sizeof(W));
  const auto* indices = static_cast<const I*>(p.indices);
  const auto* table = static_cast<const W*>(p.table.data);
  const std::int64_t last = p.indptr[end];
  for (std::int64_t b = begin; b < end; ++b) {
    A* sum = static_cast<A*>(p.out.data) + b * p.out.stride;
    for (std::int64_t k = 0; k < d; ++k) sum[k] = 0;
    for (std::int64_t e = p.indptr[b]; e < p.indptr[b + 1]; ++e) {
      if (e + kAhead < last) prefetch_row(table, indices[e + kAhead], row_bytes);
      bag_add(table + static_cast<std::int64_t>(indices[e]) * p.table.stride, p.values ? static_cast<A>(p.values[e]) : A{1},
              d, sum);
    }
    if (!p.normalise) continue;
    const double norm = __builtin_sqrt(bag_dot(sum, sum, d));
    if (p.norms) static_cast<A*>(p.norms)[b] = static_cast<A>(norm);
    const A factor = norm > 0.0 ? static_cast<A>(p.scale / norm) : A{0};
    for (std::int64_t k = 0; k < d; ++k) sum[k] *= factor;
  }
}

template <class W, class A>
void bag_forward_indices(const BagForwardPlan& p, std::int64_t begin, std::int64_t end) {
  if (p.wide)
    bag_forward_rows<W, A, std::int64_t>(p, begin, end);
  else
    bag_forward_rows<W, A, std::int32_t>(p, begin, end);
}

inline void bag_forward_range(const BagForwardPlan& p, std::int64_t begin, std::int64_t end) {
  switch (p.table.dtype) {
    case Dtype::f64: return bag_forward_indices<double, double>(p, begin, end);
    case Dtype::bf16: return bag_forward_indices<bf16, float>(p, begin, end);
    default: return bag_forward_indices<float, float>(p, begin, end);
  }
}

template <class A>
void bag_gradient_rows(const BagGradientPlan& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t d = p.grad.cols;
  for (std::int64_t b = begin; b < end; ++b) {
    const A* g = static_cast<const A*>(p.grad.data) + b * p.grad.stride;
    const A* out = static_cast<const A*>(p.out.data) + b * p.out.stride;
    A* sum = static_cast<A*>(p.sums) + b * d;
    const double norm = static_cast<const A*>(p.norms)[b];
    const A factor = norm > 0.0 ? static_cast<A>(p.scale / norm) : A{0};
    const A along = static_cast<A>(bag_dot(g, out, d) / (p.scale * p.scale));
    for (std::int64_t k = 0; k < d; ++k) sum[k] = factor * (g[k] - along * out[k]);
  }
}

inline void bag_gradient_range(const BagGradientPlan& p, std::int64_t begin, std::int64_t end) {
  if (p.grad.dtype == Dtype::f64)
    bag_gradient_rows<double>(p, begin, end);
  else
    bag_gradient_rows<float>(p, begin, end);
}

// 16 random bits a column, as RandomStream::bits16 defines them: a block serves eight columns.
inline void bag_random_bits(const Update& u, std::int64_t row, std::int64_t d, std::uint16_t* bits) {
  const RandomStream stream{u.seed, Purpose::rounding_weight, u.step};
  for (std::int64_t k = 0; k < d; k += 8) {
    const Philox4 r = stream.block(static_cast<std::uint64_t>(u.first_row + row), static_cast<std::uint32_t>(k >> 3));
    for (std::int64_t i = 0; i < 8 && k + i < d; ++i)
      bits[k + i] = static_cast<std::uint16_t>(r.v[i >> 1] >> ((i & 1) * 16));
  }
}

// Replaces the gradient g by the change of the weights, -(step), in place; moves the optimiser's state.
template <class W, class A>
void bag_change(const Update& u, std::int64_t row, const W* __restrict w, std::int64_t d, A* __restrict g) {
  const A lr = static_cast<A>(u.lr), decay = static_cast<A>(u.weight_decay), eps = static_cast<A>(u.eps);
  if (u.optimizer != Optimizer::adam && decay != 0)
    for (std::int64_t k = 0; k < d; ++k) g[k] += decay * widen(w[k]);
  if (u.optimizer == Optimizer::sgd) {
    for (std::int64_t k = 0; k < d; ++k) g[k] *= -lr;
  } else if (u.optimizer == Optimizer::adagrad) {
    A* v = static_cast<A*>(u.second.data) + row * u.second.stride;
    *v += static_cast<A>(bag_dot(g, g, d) / static_cast<double>(d));
    const A factor = -lr / (static_cast<A>(__builtin_sqrt(static_cast<double>(*v))) + eps);
    for (std::int64_t k = 0; k < d; ++k) g[k] *= factor;
  } else {
    A* __restrict m = static_cast<A*>(u.first.data) + row * u.first.stride;
    A* __restrict v = static_cast<A*>(u.second.data) + row * u.second.stride;
    const A b1 = static_cast<A>(u.beta1), b2 = static_cast<A>(u.beta2);
    const double step = static_cast<double>(u.step);
    const A m_hat = static_cast<A>(1.0 / (1.0 - __builtin_pow(u.beta1, step)));
    const A v_hat = static_cast<A>(1.0 / (1.0 - __builtin_pow(u.beta2, step)));
    for (std::int64_t k = 0; k < d; ++k) {
      m[k] = b1 * m[k] + (1 - b1) * g[k];
      v[k] = b2 * v[k] + (1 - b2) * g[k] * g[k];
      const A root = static_cast<A>(sizeof(A) == 8 ? __builtin_sqrt(v[k] * v_hat) : __builtin_sqrtf(v[k] * v_hat));
      g[k] = -lr * (m[k] * m_hat / (root + eps) + decay * widen(w[k]));
    }
  }
}

template <class A>
void bag_apply(const Update&, std::int64_t, A* __restrict w, std::int64_t d, const A* __restrict change, std::uint16_t*) {
  for (std::int64_t k = 0; k < d; ++k) w[k] += change[k];
}

inline void bag_apply(const Update& u, std::int64_t row, bf16* __restrict w, std::int64_t d, const float* __restrict change,
                      std::uint16_t* __restrict bits) {
  if (u.rounding == Rounding::stochastic) {
    bag_random_bits(u, row, d, bits);
    for (std::int64_t k = 0; k < d; ++k) w[k].bits = bf16_stochastic(widen(w[k]) + change[k], bits[k]);
  } else if (u.rounding == Rounding::kahan) {
    bf16* __restrict lost = static_cast<bf16*>(u.compensation.data) + row * u.compensation.stride;
    for (std::int64_t k = 0; k < d; ++k) {
      const float wanted = widen(w[k]) + (widen(lost[k]) + change[k]);
      w[k].bits = bf16_nearest(wanted);
      lost[k].bits = bf16_nearest(wanted - widen(w[k]));
    }
  } else {
    for (std::int64_t k = 0; k < d; ++k) w[k].bits = bf16_nearest(widen(w[k]) + change[k]);
  }
}

template <class W, class A>
void bag_step_rows(const BagStepPlan& p, std::int64_t begin, std::int64_t end, void* scratch) {
  const std::int64_t d = p.table.cols, row_bytes = p.table.stride * static_cast<std::int64_t>(sizeof(W));
  const std::int64_t first_bytes = p.update->first.stride * static_cast<std::int64_t>(sizeof(A));
  const std::int64_t second_bytes = p.update->second.stride * static_cast<std::int64_t>(sizeof(A));
  A* g = static_cast<A*>(scratch);
  auto* bits = reinterpret_cast<std::uint16_t*>(static_cast<double*>(scratch) + d);
  for (std::int64_t s = begin; s < end; ++s) {
    if (s + kAhead < p.touched) {
      const std::int64_t next = p.features[s + kAhead];
      prefetch_row_to_write(p.table.data, next, row_bytes);
      if (p.update->first) prefetch_row_to_write(p.update->first.data, next, first_bytes);
      if (p.update->second) prefetch_row_to_write(p.update->second.data, next, second_bytes);
    }
    for (std::int64_t k = 0; k < d; ++k) g[k] = 0;
    for (std::int64_t e = p.segments[s]; e < p.segments[s + 1]; ++e)
      bag_add(static_cast<const A*>(p.grad.data) + p.examples[e] * p.grad.stride,
              p.values ? static_cast<A>(p.values[e]) : A{1}, d, g);
    const std::int64_t row = p.features[s];
    W* w = static_cast<W*>(p.table.data) + row * p.table.stride;
    bag_change(*p.update, row, w, d, g);
    bag_apply(*p.update, row, w, d, g, bits);
  }
}

inline void bag_step_range(const BagStepPlan& p, std::int64_t begin, std::int64_t end, void* scratch) {
  switch (p.table.dtype) {
    case Dtype::f64: return bag_step_rows<double, double>(p, begin, end, scratch);
    case Dtype::bf16: return bag_step_rows<bf16, float>(p, begin, end, scratch);
    default: return bag_step_rows<float, float>(p, begin, end, scratch);
  }
}

inline constexpr BagKernels kBagKernels = {bag_forward_range, bag_gradient_range, bag_step_range};
