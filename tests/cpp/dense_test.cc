// dense_test.cc -- the fused dense head against an obvious float64 computation, on every instruction set
#include "widehead/dense.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <random>

#include "check.h"
#include "widehead/parallel.h"
#include "widehead/random.h"

using namespace widehead;
using std::int64_t;

namespace {

struct Shape {
  int64_t batch, classes, features;
};

// One multi-label problem with everything in float64, and the same numbers in T.
template <class T>
struct Problem {
  Shape s;
  std::vector<double> h, w, b;
  std::vector<T> hidden, weight, bias;
  std::vector<int64_t> indptr{0}, indices, single;
  std::vector<float> values;

  explicit Problem(Shape shape, unsigned seed = 1) : s(shape) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<double>& exact, std::vector<T>& rounded, int64_t n, float scale) {
      for (int64_t i = 0; i < n; ++i) {
        rounded.push_back(static_cast<T>(normal(random) * scale));
        exact.push_back(static_cast<double>(rounded.back()));
      }
    };
    fill(h, hidden, s.batch * s.features, 1.0f);
    fill(w, weight, s.classes * s.features, 1.0f / std::sqrt(static_cast<float>(s.features)));
    fill(b, bias, s.classes, 1.0f);
    for (int64_t i = 0; i < s.batch; ++i) {
      single.push_back(static_cast<int64_t>(random() % static_cast<unsigned>(s.classes)));
      const int64_t n = std::min<int64_t>(s.classes, static_cast<int64_t>(random() % 4));
      for (int64_t j = 0; j < n; ++j) {
        indices.push_back((single.back() + j * std::max<int64_t>(1, s.classes / 5)) % s.classes);
        if (std::count(indices.begin() + indptr.back(), indices.end(), indices.back()) > 1) {
          indices.pop_back();
          continue;
        }
        values.push_back(0.25f * static_cast<float>(1 + random() % 8));
      }
      indptr.push_back(static_cast<int64_t>(indices.size()));
    }
  }
  DenseLayer layer() {
    return {matrix(hidden.data(), s.batch, s.features), matrix(weight.data(), s.classes, s.features),
            ConstAnyVector(bias.data(), s.classes)};
  }
  Labels multi() const { return {indptr.data(), indices.data(), values.data(), s.batch, s.classes}; }
  double logit(int64_t i, int64_t c) const {
    double z = b[static_cast<std::size_t>(c)];
    for (int64_t k = 0; k < s.features; ++k)
      z += h[static_cast<std::size_t>(i * s.features + k)] * w[static_cast<std::size_t>(c * s.features + k)];
    return z;
  }
};

struct Expected {
  std::vector<double> losses, output, lse, grad_hidden, grad_weight, grad_bias;
};

// Losses of loss.h, and the gradient of sum_i scale_i loss_i, by definition.
template <class T>
Expected reference(const Problem<T>& p, const LossOptions& loss, const std::vector<double>& scale) {
  const auto [B, D, d] = p.s;
  Expected e;
  e.grad_hidden.assign(static_cast<std::size_t>(B * d), 0);
  e.grad_weight.assign(static_cast<std::size_t>(D * d), 0);
  e.grad_bias.assign(static_cast<std::size_t>(D), 0);
  std::vector<double> z(static_cast<std::size_t>(D)), y, g;
  for (int64_t i = 0; i < B; ++i) {
    y.assign(z.size(), 0);
    g.assign(z.size(), 0);
    for (int64_t j = p.indptr[static_cast<std::size_t>(i)]; j < p.indptr[static_cast<std::size_t>(i) + 1]; ++j)
      y[static_cast<std::size_t>(p.indices[static_cast<std::size_t>(j)])] =
          static_cast<double>(p.values[static_cast<std::size_t>(j)]);
    double top = -std::numeric_limits<double>::infinity(), sum = 0, l = 0, out = 0, total = 0;
    for (int64_t c = 0; c < D; ++c) top = std::max(top, z[static_cast<std::size_t>(c)] = p.logit(i, c));
    for (double x : z) sum += std::exp(x - top);
    const double lse = top + std::log(sum);
    for (double v : y) total += v;
    for (std::size_t c = 0; c < z.size(); ++c) {
      if (loss.kind == Loss::softmax) {
        l += y[c] * (lse - z[c]);
        out += y[c] * (z[c] - lse);
        g[c] = total * std::exp(z[c] - lse) - y[c] + 2 * loss.lse_penalty * lse * std::exp(z[c] - lse);
      } else if (loss.kind == Loss::bce) {
        l += std::max(z[c], 0.0) + std::log1p(std::exp(-std::abs(z[c]))) - y[c] * z[c];
        out += y[c] * z[c];
        g[c] = 1 / (1 + std::exp(-z[c])) - y[c];
      } else {
        const double m = y[c] > 0 ? std::max(0.0, 1 - z[c]) : std::max(0.0, 1 + z[c]);
        l += (y[c] > 0 ? y[c] : 1) * m * m;
        out += y[c] * z[c];
        g[c] = y[c] > 0 ? -2 * y[c] * m : 2 * m;
      }
    }
    if (loss.kind == Loss::softmax) l += loss.lse_penalty * lse * lse;
    e.losses.push_back(l);
    e.output.push_back(out);
    e.lse.push_back(lse);
    for (int64_t c = 0; c < D; ++c) {
      const double gc = g[static_cast<std::size_t>(c)] * scale[static_cast<std::size_t>(i)];
      e.grad_bias[static_cast<std::size_t>(c)] += gc;
      for (int64_t k = 0; k < d; ++k) {
        e.grad_hidden[static_cast<std::size_t>(i * d + k)] += gc * p.w[static_cast<std::size_t>(c * d + k)];
        e.grad_weight[static_cast<std::size_t>(c * d + k)] += gc * p.h[static_cast<std::size_t>(i * d + k)];
      }
    }
  }
  return e;
}

template <class T>
struct Result {
  std::vector<T> losses, output, lse, grad_hidden, grad_weight, grad_bias;
};

template <class T>
Result<T> run(Problem<T>& p, const LossOptions& loss, const std::vector<T>& scale, const Update* update = nullptr) {
  const auto [B, D, d] = p.s;
  Result<T> r;
  for (auto* v : {&r.losses, &r.output, &r.lse}) v->resize(static_cast<std::size_t>(B));
  r.grad_hidden.resize(static_cast<std::size_t>(B * d));
  r.grad_weight.resize(static_cast<std::size_t>(D * d));
  r.grad_bias.resize(static_cast<std::size_t>(D));
  const bool softmax = loss.kind == Loss::softmax;
  dense_forward({.layer = p.layer(),
                 .target = p.multi(),
                 .loss = loss,
                 .losses = AnyVector(r.losses.data(), B),
                 .output = AnyVector(r.output.data(), B),
                 .lse = softmax ? AnyVector(r.lse.data(), B) : AnyVector()});
  DenseBackward back{.layer = p.layer(), .target = p.multi(), .loss = loss};
  if (softmax) back.lse = ConstAnyVector(r.lse.data(), B);
  back.grad_losses = ConstAnyVector(scale.data(), B);
  back.grad_hidden = matrix(r.grad_hidden.data(), B, d);
  if (update) {
    back.update = update;
  } else {
    back.grad_weight = matrix(r.grad_weight.data(), D, d);
    back.grad_bias = AnyVector(r.grad_bias.data(), D);
  }
  dense_backward(back);
  return r;
}

// Two-sided: every element within `tolerance` of the largest magnitude that occurs.
template <class T>
void expect_close(const std::vector<T>& got, const std::vector<double>& want, double tolerance, const char* what) {
  double size = 0.5;  // the terms that cancel are of this size
  for (double x : want) size = std::max(size, std::abs(x));
  for (std::size_t i = 0; i < want.size(); ++i)
    check::near(static_cast<double>(got[i]), want[i], tolerance * size, what, __FILE__, static_cast<int>(i));
}

template <class T>
void compare(Shape shape, Loss kind, double penalty, double tolerance) {
  Problem<T> p(shape);
  LossOptions loss;
  loss.kind = kind;
  loss.lse_penalty = penalty;
  std::vector<T> scale;
  std::vector<double> exact;
  for (int64_t i = 0; i < shape.batch; ++i) {
    scale.push_back(static_cast<T>(0.5 + static_cast<double>(i % 3)));
    exact.push_back(static_cast<double>(scale.back()));
  }
  const Expected want = reference(p, loss, exact);
  const Result<T> got = run(p, loss, scale);
  expect_close(got.losses, want.losses, tolerance, "losses");
  expect_close(got.output, want.output, tolerance, "output");
  if (kind == Loss::softmax) expect_close(got.lse, want.lse, tolerance, "lse");
  expect_close(got.grad_hidden, want.grad_hidden, tolerance, "grad_hidden");
  expect_close(got.grad_weight, want.grad_weight, tolerance, "grad_weight");
  expect_close(got.grad_bias, want.grad_bias, tolerance, "grad_bias");
}

const Shape kShapes[] = {{1, 1, 1}, {3, 13, 5}, {17, 97, 31}, {33, 12, 64}, {130, 200, 33}, {300, 101, 16}};

}  // namespace

TEST(losses_and_gradients_float32) {
  for (const Shape& s : kShapes)
    for (Loss kind : {Loss::softmax, Loss::bce, Loss::squared_hinge})
      compare<float>(s, kind, kind == Loss::softmax ? 0.01 : 0, 4e-6);
}

TEST(losses_and_gradients_float64) {
  for (const Shape& s : kShapes)
    for (Loss kind : {Loss::softmax, Loss::bce, Loss::squared_hinge})
      compare<double>(s, kind, kind == Loss::softmax ? 0.01 : 0, 1e-13);
}

// More than 32 MiB of partial gradients: the batch is walked first, then the classes.
TEST(large_batch_walks_the_batch) {
  const Shape shape{2304, 800, 512};
  Problem<float> p(shape);
  LossOptions loss;
  const std::vector<float> scale(2304, 1.0f);
  const Result<float> whole = run(p, loss, scale);
  std::vector<double> weight(static_cast<std::size_t>(shape.classes * shape.features), 0);
  const int64_t part = 256;
  for (int64_t first = 0; first < shape.batch; first += part) {
    Problem<float> q(shape);
    q.s.batch = part;
    q.hidden.assign(p.hidden.begin() + first * shape.features, p.hidden.begin() + (first + part) * shape.features);
    q.indptr.assign(p.indptr.begin() + first, p.indptr.begin() + first + part + 1);
    const Result<float> r = run(q, loss, std::vector<float>(static_cast<std::size_t>(part), 1.0f));
    for (std::size_t i = 0; i < weight.size(); ++i) weight[i] += static_cast<double>(r.grad_weight[i]);
    for (std::size_t i = 0; i < r.grad_hidden.size(); ++i)
      CHECK_NEAR(whole.grad_hidden[static_cast<std::size_t>(first * shape.features) + i], r.grad_hidden[i], 1e-5);
  }
  expect_close(whole.grad_weight, weight, 1e-5, "grad_weight");
}

TEST(same_bits_for_any_number_of_threads) {
  const int before = get_num_threads();
  Problem<float> p({70, 3000, 40});
  LossOptions loss;
  const std::vector<float> scale(70, 0.1f);
  set_num_threads(1);
  const Result<float> one = run(p, loss, scale);
  for (int threads : {2, 3, 4}) {
    set_num_threads(threads);
    const Result<float> many = run(p, loss, scale);
    CHECK(one.losses == many.losses);
    CHECK(one.grad_hidden == many.grad_hidden);
    CHECK(one.grad_weight == many.grad_weight);
  }
  set_num_threads(before);
}

TEST(fused_sgd_equals_gradient_then_step) {
  Problem<float> p({33, 150, 37});
  LossOptions loss;
  const std::vector<float> scale(33, 1.0f / 33);
  const Result<float> plain = run(p, loss, scale);
  const std::vector<float> weight = p.weight, bias = p.bias;
  Update update;
  update.lr = 0.5;
  update.weight_decay = 0.01;
  const Result<float> fused = run(p, loss, scale, &update);
  CHECK(fused.grad_hidden == plain.grad_hidden);
  for (std::size_t i = 0; i < weight.size(); ++i)
    CHECK_NEAR(p.weight[i], weight[i] - 0.5 * (plain.grad_weight[i] + 0.01 * weight[i]), 1e-6);
  for (std::size_t i = 0; i < bias.size(); ++i)
    CHECK_NEAR(p.bias[i], bias[i] - 0.5 * (plain.grad_bias[i] + 0.01 * bias[i]), 1e-6);
}

TEST(stochastic_rounding_follows_the_generator) {
  const int64_t D = 5, d = 300;
  std::vector<bf16> weight(static_cast<std::size_t>(D * d));
  for (std::size_t i = 0; i < weight.size(); ++i)
    weight[i].bits = bf16_nearest(0.01f * static_cast<float>(i % 97) - 0.4f);
  const std::vector<bf16> old = weight;
  std::vector<float> hidden(static_cast<std::size_t>(d), 0.0f), lse(1), losses(1), one{1.0f};
  const int64_t label = 2;
  const Labels target{nullptr, &label, nullptr, 1, D};
  const DenseLayer layer{matrix(hidden.data(), 1, d), matrix(weight.data(), D, d)};
  dense_forward(
      {.layer = layer, .target = target, .losses = AnyVector(losses.data(), 1), .lse = AnyVector(lse.data(), 1)});
  // Without a gradient the step is the decay alone: w becomes (1 - lr wd) w, rounded with the bits of (row, column).
  Update update;
  update.lr = 0.1;
  update.weight_decay = 0.013;
  update.step = 7;
  update.seed = 0x123456789abcull;
  DenseBackward back{.layer = layer, .target = target};
  back.lse = ConstAnyVector(lse.data(), 1);
  back.grad_losses = ConstAnyVector(one.data(), 1);
  back.update = &update;
  dense_backward(back);
  int64_t moved = 0;
  for (int64_t r = 0; r < D; ++r)
    for (int64_t c = 0; c < d; ++c) {
      const auto i = static_cast<std::size_t>(r * d + c);
      const float w = bf16_float(old[i].bits), g = 0.013f * w;
      const RandomStream stream{update.seed, Purpose::rounding_weight, 7};
      const std::uint16_t want = bf16_stochastic(
          std::fma(-0.1f, g, w), stream.bits16(static_cast<std::uint64_t>(r), static_cast<std::uint64_t>(c)));
      const std::uint16_t apart =
          bf16_stochastic(w - 0.1f * g, stream.bits16(static_cast<std::uint64_t>(r), static_cast<std::uint64_t>(c)));
      CHECK(weight[i].bits == want || weight[i].bits == apart);  // with or without a fused multiply-add
      moved += weight[i].bits != old[i].bits;
    }
  CHECK(moved > 100);
}

TEST(topk_equals_a_sort) {
  for (const Shape& s : kShapes) {
    Problem<float> p(s);
    for (int64_t c = 1; c < s.classes; c += 3) {  // ties: every third class equals the one before
      std::copy_n(p.weight.begin() + (c - 1) * s.features, s.features, p.weight.begin() + c * s.features);
      p.bias[static_cast<std::size_t>(c)] = p.bias[static_cast<std::size_t>(c - 1)];
    }
    const int64_t k = 7;
    std::vector<float> scores(static_cast<std::size_t>(s.batch * k)),
        logits(static_cast<std::size_t>(s.batch * s.classes));
    std::vector<int64_t> classes(scores.size());
    dense_topk({.layer = p.layer(),
                .k = k,
                .scores = matrix(scores.data(), s.batch, k),
                .classes = matrix(classes.data(), s.batch, k)});
    dense_logits({.layer = p.layer(), .logits = matrix(logits.data(), s.batch, s.classes)});
    for (int64_t i = 0; i < s.batch; ++i) {
      std::vector<int64_t> order(static_cast<std::size_t>(s.classes));
      for (int64_t c = 0; c < s.classes; ++c) order[static_cast<std::size_t>(c)] = c;
      const float* z = logits.data() + i * s.classes;
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return z[a] > z[b]; });
      for (int64_t j = 0; j < k; ++j) {
        const auto at = static_cast<std::size_t>(i * k + j);
        CHECK_EQ(classes[at], j < s.classes ? order[static_cast<std::size_t>(j)] : -1);
        if (j < s.classes) CHECK_EQ(scores[at], z[classes[at]]);
      }
    }
  }
}

TEST(bad_input_changes_nothing) {
  Problem<float> p({4, 20, 8});
  const std::vector<float> weight = p.weight, scale(4, 1.0f);
  Update update;
  update.lr = 0.1;
  LossOptions loss;
  p.hidden[9] = std::numeric_limits<float>::quiet_NaN();
  loss.kind = Loss::bce;
  CHECK_THROWS(NonFiniteError, run(p, loss, scale, &update), "row 1");
  p.hidden[9] = 0;
  p.indices.back() = 20;
  CHECK_THROWS(LabelError, run(p, loss, scale, &update), "20");
  update.step = 0;
  CHECK_THROWS(Error, run(p, loss, scale, &update), "");
  CHECK(p.weight == weight);
}
